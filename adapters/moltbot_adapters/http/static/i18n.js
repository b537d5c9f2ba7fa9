// Every sentence of the page, in English and Chinese, and the marks on nodes that let a switch of language find them again.

const SENTENCES = {
  "lang.name": ["English", "中文"],
  "lang.switch": ["切换到中文", "Switch to English"],
  "skip": ["Skip to the message box", "跳到输入框"],
  "chats": ["Chats", "对话"],
  "chats.none": ["Chats held on this page will appear here. Those from other programs are not listed.", "在这个网页里的对话会显示在这里；其他程序里的对话不在此列。"],
  "chats.more": ["Load older chats", "加载更早的对话"],
  "chats.failed": ["The list could not be loaded.", "对话列表加载失败。"],
  "chat.new": ["New chat", "新对话"],
  "chat.untitled": ["Untitled chat", "未命名对话"],
  "chat.delete": ["Delete “{title}”", "删除“{title}”"],
  "chat.running": ["An answer is being written", "正在回答"],
  "chat.earlier": ["Show earlier messages", "显示更早的消息"],
  "chat.loading": ["Opening the chat…", "正在打开对话…"],
  "chat.gone": ["This chat does not exist any more.", "这个对话已不存在。"],
  "day.today": ["Today", "今天"],
  "day.yesterday": ["Yesterday", "昨天"],
  "day.week": ["Previous 7 days", "过去 7 天"],
  "day.older": ["Older", "更早"],
  "sidebar.open": ["Show the list of chats", "显示对话列表"],
  "sidebar.close": ["Hide the list of chats", "隐藏对话列表"],
  "theme": ["Theme: {name}", "主题：{name}"],
  "theme.system": ["system", "跟随系统"],
  "theme.light": ["light", "浅色"],
  "theme.dark": ["dark", "深色"],
  "signout": ["Sign out", "退出登录"],
  "model": ["Model", "模型"],
  "model.builtin": ["MoltBot built-in model", "MoltBot 内置模型"],
  "named": ["{name}", "{name}"],
  "user.owner": ["owner", "所有者"],
  "you": ["You said", "你说"],
  "bot": ["MoltBot answered", "MoltBot 回答"],
  "greeting": ["What can I help with?", "有什么可以帮你？"],
  "greeting.sub": ["Ask in English or Chinese. Answering: {model}.", "中文、英文都可以。回答者：{model}。"],
  "try.1.title": ["Meet MoltBot", "认识 MoltBot"],
  "try.1.text": ["What is MoltBot?", "MoltBot 是什么？"],
  "try.2.title": ["Bring a model", "换上自己的模型"],
  "try.2.text": ["How do I use my own model?", "怎么使用自己的模型？"],
  "try.3.title": ["Call it from code", "从代码里调用"],
  "try.3.text": ["How do I use the OpenAI client with MoltBot?", "怎么用 OpenAI 客户端连接？"],
  "try.4.title": ["Find your way", "看看能问什么"],
  "try.4.text": ["What can I ask you?", "我可以问你什么？"],
  "composer.label": ["Message to MoltBot", "给 MoltBot 的消息"],
  "composer.placeholder": ["Message MoltBot", "给 MoltBot 发消息"],
  "composer.hint": ["Enter sends · Shift+Enter starts a new line · {mod}K starts a new chat", "Enter 发送 · Shift+Enter 换行 · {mod}K 新对话"],
  "composer.note": ["MoltBot can be wrong. Check what matters.", "MoltBot 也会出错，重要内容请核实。"],
  "send": ["Send", "发送"],
  "stop": ["Stop (Esc)", "停止（Esc）"],
  "held": ["The answer is still being written. Your message stays here; Stop (Esc) ends the answer.", "回答还没写完，你的消息先留在这里；“停止”（Esc）可结束回答。"],
  "stopping": ["Stopping…", "正在停止…"],
  "jump": ["Jump to latest", "回到最新"],
  "copy": ["Copy", "复制"],
  "copy.answer": ["Copy the answer", "复制回答"],
  "copy.code": ["Copy the code", "复制代码"],
  "copied": ["Copied", "已复制"],
  "copy.failed": ["Copying was not allowed", "浏览器不允许复制"],
  "code.plain": ["text", "文本"],
  "thinking": ["Thinking", "正在思考"],
  "queued": ["Waiting in line, position {position}", "排队中，第 {position} 位"],
  "queued.next": ["You are next in line", "排队中，下一个就是你"],
  "reconnecting": ["Connection lost. Reconnecting…", "连接断开，正在重连…"],
  "waiting.store": ["The server cannot reach its store. Trying again…", "服务器暂时无法访问其存储，正在重试…"],
  "resuming": ["Picking up where it was", "正在接上之前的回答"],
  "routed.plugin": ["Plugin {name}", "插件 {name}"],
  "routed.skill": ["Skill {name}", "技能 {name}"],
  "routed.command": ["Command {name}", "命令 {name}"],
  "tool.running": ["Running {tool}", "正在运行 {tool}"],
  "tool.done": ["{tool} · {ms} ms", "{tool} · {ms} 毫秒"],
  "tool.failed": ["{tool} failed", "{tool} 失败"],
  "tool.asked": ["Asks for {tool}", "请求调用 {tool}"],
  "notice.switch": ["Switched from {from} to {to}: {reason}", "已从 {from} 切换到 {to}：{reason}"],
  "notice.switch.bare": ["Switched from {from} to {to}", "已从 {from} 切换到 {to}"],
  "notice.other": ["Note: {what}", "提示：{what}"],
  "thoughts": ["Thoughts", "思考过程"],
  "attachment": ["Attachment: {name}", "附件：{name}"],
  "reset": ["The answer was started again{times}", "回答已重新开始{times}"],
  "stopped": ["Stopped", "已停止"],
  "end.length": ["Length limit reached. Ask for less at once.", "回答达到了长度上限，请一次少问一些。"],
  "end.joined": ["Answered together with your next message", "与下一条消息一起回答"],
  "end.filter": ["The rest of the answer was withheld by a content filter.", "其余内容被内容过滤器拦截。"],
  "empty": ["The model gave no answer. Ask in other words.", "模型没有给出回答，请换个说法再问。"],
  "meta.model": ["Model {model}", "模型 {model}"],
  "meta.cached": ["kept from before", "来自缓存"],
  "meta.first": ["first word {time}", "首字 {time}"],
  "meta.total": ["total {time}", "总计 {time}"],
  "meta.tokens": ["{input} tokens in, {output} out", "输入 {input}、输出 {output} 个 token"],
  "meta.trimmed": ["{n} older messages did not fit", "有 {n} 条较早的消息放不下"],
  "retry": ["Try again", "重试"],
  "edit": ["Edit the message", "修改消息"],
  "resume": ["Continue", "继续"],
  "reload": ["Reload the chat", "重新加载对话"],
  "error.title": ["No answer", "没有得到回答"],
  "error.partial": ["The answer broke off", "回答中断了"],
  "error.link": ["The server cannot be reached. Your message is safe; nothing is sent twice.", "无法连接服务器。你的消息没有丢，也不会重复发送。"],
  "error.link.accepted": ["The connection broke in the middle. MoltBot went on without this page, so you can pick the answer up.", "连接中途断开。MoltBot 仍在继续，可以接着取回这个回答。"],
  "error.busy": ["MoltBot is busy right now. Try again in {time}.", "MoltBot 现在很忙，请在 {time}后重试。"],
  "error.busy.soon": ["MoltBot is busy right now. Try again in a moment.", "MoltBot 现在很忙，请稍后重试。"],
  "error.model": ["The model did not answer.", "模型没有回应。"],
  "error.model.away": ["The model cannot answer right now. Try again in a moment.", "模型暂时无法回答，请稍后重试。"],
  "error.budget": ["The budget is used up. Try again in the next period, or ask whoever runs MoltBot to raise it.", "额度已用完，请等下个周期再试，或请 MoltBot 的管理员提高额度。"],
  "error.credential": ["The model’s provider accepts no key of this server. Whoever runs MoltBot adds one with “moltbot key add”.", "模型服务商不接受这台服务器的密钥，请 MoltBot 的管理员用 “moltbot key add” 添加。"],
  "error.serving": ["MoltBot is starting or stopping. Try again in a moment.", "MoltBot 正在启动或停止，请稍后重试。"],
  "error.context": ["The message is too long for the model. Shorten it, or choose a model that reads more.", "消息超出了模型能读的长度，请缩短，或换一个能读更长内容的模型。"],
  "error.toolarge": ["The message is too long. Shorten it and send it again.", "消息太长了，请缩短后再发送。"],
  "error.blank": ["The message is empty. Write something and send it again.", "消息是空的，请写点内容再发送。"],
  "error.storage": ["The server’s disk is full. Free some space there, then try again.", "服务器的磁盘已满，请先清理出空间再重试。"],
  "error.store": ["The server cannot reach its store. Try again in a moment.", "服务器暂时无法访问其存储，请稍后重试。"],
  "error.slow": ["The answer took too long. Try again, or ask for less at once.", "回答用时过长，请重试，或一次少问一些。"],
  "error.key": ["MoltBot did not accept the access key. Sign out and in again; if that does not help, restart MoltBot.", "MoltBot 不接受访问密钥，请退出后重新登录；仍不行请重启 MoltBot。"],
  "error.forbidden": ["MoltBot refused this; the details say why.", "MoltBot 拒绝了这个请求，原因见详情。"],
  "error.gone": ["This chat or this answer does not exist any more.", "这个对话或回答已不存在。"],
  "error.other": ["Something went wrong.", "出了点问题。"],
  "error.detail": ["Details: {detail}", "详情：{detail}"],
  "delete.title": ["Delete this chat?", "删除这个对话？"],
  "delete.text": ["“{title}” and all its messages will be removed from the server. This cannot be undone.", "“{title}”及其全部消息将从服务器上删除，无法恢复。"],
  "delete.yes": ["Delete", "删除"],
  "delete.failed": ["The chat could not be deleted.", "对话删除失败。"],
  "cancel": ["Cancel", "取消"],
  "link.picture": ["Picture: {alt}", "图片：{alt}"],
  "link.picture.bare": ["Picture", "图片"],
  "announce.busy": ["MoltBot is answering", "MoltBot 正在回答"],
  "announce.stopped": ["The answer was stopped", "回答已停止"],
  "announce.done": ["End of the answer", "回答结束"],
  "signin.title": ["Sign in to MoltBot", "登录 MoltBot"],
  "signin.link": ["The easy way: open the link that MoltBot printed in your terminal when it started. It works once. “moltbot link” prints another; after “make run” it is “.venv/bin/moltbot link”.", "最简单的方法：打开 MoltBot 启动时在终端里打印的链接。链接只能用一次；要新链接，运行 “moltbot link”，用 “make run” 启动的则运行 “.venv/bin/moltbot link”。"],
  "signin.or": ["or paste an access key", "或者粘贴访问密钥"],
  "signin.key": ["Access key", "访问密钥"],
  "signin.where": ["The key is in the file “key” of the workspace: ~/.moltbot/key unless another folder was chosen.", "密钥在工作区的 key 文件里：没有另选文件夹时就是 ~/.moltbot/key。"],
  "signin.go": ["Sign in", "登录"],
  "signin.wrong": ["This key is not known here. Copy the one in the file “key” of the workspace, or run “moltbot link” and open the link that it prints.", "这里不认识这个密钥。请复制工作区的 key 文件里的密钥，或运行 “moltbot link”，再打开它打印的链接。"],
  "signin.used": ["This link was already used or has expired. Get a new one as said below, or paste a key.", "这个链接已被使用或已过期。请按下面的说明获取新链接，或粘贴密钥。"],
  "signin.ended": ["Your sign-in has ended. Please sign in again.", "登录已过期，请重新登录。"],
  "signin.down": ["The server cannot be reached.", "无法连接服务器。"],
  "boot.down": ["MoltBot cannot be reached. This page tries again by itself.", "无法连接 MoltBot，页面会自动重试。"],
  "seconds": ["{n} s", "{n} 秒"],
  "milliseconds": ["{n} ms", "{n} 毫秒"],
};

const BUILT_IN = "moltbot-demo";
const LANGUAGES = ["en", "zh"];
let current = "en";

export const language = () => current;

/** The language for a browser's preferences: Chinese when Chinese is the first of the two that it names. */
export function preferred(tags) {
  for (const tag of tags) {
    const base = tag.toLowerCase().split("-")[0];
    if (LANGUAGES.includes(base)) return base;
  }
  return "en";
}

function fill(sentence, vars) {
  const word = (value) => String(typeof value === "function" ? value() : value); // a function knows the word in the language of the moment
  return sentence.replace(/\{(\w+)\}/g, (whole, name) => (name in vars ? word(vars[name]) : whole));
}

/** A sentence in the page's language, or in `inLanguage`. */
export function t(key, vars = {}, inLanguage = current) {
  return fill(SENTENCES[key][LANGUAGES.indexOf(inLanguage)], vars);
}

const marked = Symbol("sentences");

/** Writes a sentence into a node (or one of its attributes) so that a later switch of language rewrites it; answers the node. */
export function say(node, key, { vars = {}, attr = "" } = {}) {
  node[marked] ??= new Map();
  node[marked].set(attr, { key, vars });
  node.classList.add("i18n");
  write(node, attr, key, vars);
  return node;
}

/** Labels a control for eyes (tooltip) and screen readers alike. */
export function label(node, key, vars = {}) {
  say(node, key, { vars, attr: "aria-label" });
  return say(node, key, { vars, attr: "title" });
}

function write(node, attr, key, vars) {
  if (attr) node.setAttribute(attr, t(key, vars));
  else node.textContent = t(key, vars);
}

/** Switches the page to a language; nodes that `say` wrote follow at once. */
export function speak(name) {
  current = LANGUAGES.includes(name) ? name : "en";
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll(".i18n")) {
    for (const [attr, { key, vars }] of node[marked] ?? []) write(node, attr, key, vars);
  }
}

/** What people call a model: the core's name for it; the built-in one has a Chinese name too. */
export function modelName({ id = "", display_name: name = "" } = {}) {
  return id === BUILT_IN && current === "zh" ? t("model.builtin") : name || id || "MoltBot";
}

/** What people call a user: the owner of the workspace is a role and no name. */
export const userName = (user) => (user === "owner" ? t("user.owner") : user);

/** A duration for people. */
export function duration(ms) {
  if (ms < 1000) return t("milliseconds", { n: Math.round(ms) });
  return t("seconds", { n: (ms / 1000).toFixed(ms < 10_000 ? 1 : 0) });
}
