// Every sentence of the page, in English and Chinese, and the marks on nodes that let a switch of language find them again.

const en = {
  "lang.name": "English",
  "lang.switch": "切换到中文",
  "skip": "Skip to the message box",
  "chats": "Chats",
  "chats.none": "Your conversations will appear here.",
  "chats.more": "Load older chats",
  "chats.failed": "The list could not be loaded.",
  "chat.new": "New chat",
  "chat.untitled": "Untitled chat",
  "chat.delete": "Delete “{title}”",
  "chat.running": "An answer is being written",
  "chat.earlier": "Show earlier messages",
  "chat.loading": "Opening the chat…",
  "chat.gone": "This chat does not exist any more.",
  "day.today": "Today",
  "day.yesterday": "Yesterday",
  "day.week": "Previous 7 days",
  "day.older": "Older",
  "sidebar.open": "Show the list of chats",
  "sidebar.close": "Hide the list of chats",
  "theme": "Theme: {name}",
  "theme.system": "like the system",
  "theme.light": "light",
  "theme.dark": "dark",
  "signout": "Sign out",
  "model": "Model",
  "you": "You said",
  "bot": "MoltBot answered",
  "greeting": "What can I help with?",
  "greeting.sub": "Ask anything, in English or Chinese. Answers come from {model}, running where you started MoltBot.",
  "try.1.title": "Meet MoltBot",
  "try.1.text": "What is MoltBot and what can it do?",
  "try.2.title": "First gRPC call",
  "try.2.text": "How do I call MoltBot through gRPC from Python?",
  "try.3.title": "Bring a model",
  "try.3.text": "How do I use my own model?",
  "try.4.title": "Where your team talks",
  "try.4.text": "How do I connect MoltBot to Slack?",
  "composer.label": "Message to MoltBot",
  "composer.placeholder": "Message MoltBot",
  "composer.hint": "Enter sends · Shift+Enter starts a new line · {mod}K starts a new chat",
  "composer.note": "MoltBot can be wrong. Check what matters.",
  "send": "Send",
  "stop": "Stop (Esc)",
  "stopping": "Stopping…",
  "jump": "Jump to latest",
  "copy": "Copy",
  "copy.answer": "Copy the answer",
  "copy.code": "Copy the code",
  "copied": "Copied",
  "copy.failed": "Copying was not allowed",
  "code.plain": "text",
  "thinking": "Thinking",
  "queued": "Waiting in line, position {position}",
  "queued.next": "You are next in line",
  "reconnecting": "Connection lost. Reconnecting…",
  "resuming": "Picking up where it was",
  "routed.plugin": "Plugin {name}",
  "routed.skill": "Skill {name}",
  "routed.command": "Command {name}",
  "tool.running": "Running {tool}",
  "tool.done": "{tool} · {ms} ms",
  "tool.failed": "{tool} failed",
  "notice.failover": "{from} did not answer; {to} took over",
  "notice.other": "Note: {code}",
  "attachment": "Attachment: {name}",
  "reset": "The answer was started again",
  "stopped": "Stopped",
  "end.length": "The answer reached its length limit.",
  "end.filter": "The rest of the answer was withheld by a content filter.",
  "empty": "The answer was empty.",
  "meta.model": "Model {model}",
  "meta.first": "first word {time}",
  "meta.total": "total {time}",
  "meta.tokens": "{input} tokens in, {output} out",
  "meta.trimmed": "{n} older messages did not fit",
  "retry": "Try again",
  "resume": "Continue",
  "reload": "Reload the chat",
  "error.title": "No answer",
  "error.partial": "The answer broke off",
  "error.link": "The server cannot be reached. Your message is safe; nothing is sent twice.",
  "error.link.accepted": "The connection broke in the middle. MoltBot went on without this page, so you can pick the answer up.",
  "error.busy": "MoltBot is busy right now. Try again in {time}.",
  "error.busy.soon": "MoltBot is busy right now. Try again in a moment.",
  "error.model": "The model did not answer.",
  "error.toolarge": "The message is too long.",
  "error.slow": "The answer took too long.",
  "error.forbidden": "You may not do this.",
  "error.gone": "This chat or this answer does not exist any more.",
  "error.other": "Something went wrong.",
  "error.detail": "Details: {detail}",
  "delete.title": "Delete this chat?",
  "delete.text": "“{title}” and all its messages will be removed from the server. This cannot be undone.",
  "delete.yes": "Delete",
  "delete.failed": "The chat could not be deleted.",
  "cancel": "Cancel",
  "link.picture": "Picture: {alt}",
  "link.picture.bare": "Picture",
  "announce.busy": "MoltBot is answering",
  "announce.stopped": "The answer was stopped",
  "announce.done": "End of the answer",
  "signin.title": "Sign in to MoltBot",
  "signin.link": "The easy way: open the link that “moltbot start” printed in your terminal. It works once.",
  "signin.or": "or paste an access key",
  "signin.key": "Access key",
  "signin.where": "“moltbot init” saved a key in the workspace folder.",
  "signin.go": "Sign in",
  "signin.wrong": "This key is not known here.",
  "signin.used": "This link was already used or has expired. Restart “moltbot start” for a new one, or paste a key.",
  "signin.ended": "Your sign-in has ended. Please sign in again.",
  "signin.down": "The server cannot be reached.",
  "boot.down": "MoltBot cannot be reached. This page tries again by itself.",
  "seconds": "{n} s",
  "milliseconds": "{n} ms",
};

const zh = {
  "lang.name": "中文",
  "lang.switch": "Switch to English",
  "skip": "跳到输入框",
  "chats": "对话",
  "chats.none": "你的对话会显示在这里。",
  "chats.more": "加载更早的对话",
  "chats.failed": "对话列表加载失败。",
  "chat.new": "新对话",
  "chat.untitled": "未命名对话",
  "chat.delete": "删除“{title}”",
  "chat.running": "正在回答",
  "chat.earlier": "显示更早的消息",
  "chat.loading": "正在打开对话…",
  "chat.gone": "这个对话已不存在。",
  "day.today": "今天",
  "day.yesterday": "昨天",
  "day.week": "过去 7 天",
  "day.older": "更早",
  "sidebar.open": "显示对话列表",
  "sidebar.close": "隐藏对话列表",
  "theme": "主题：{name}",
  "theme.system": "跟随系统",
  "theme.light": "浅色",
  "theme.dark": "深色",
  "signout": "退出登录",
  "model": "模型",
  "you": "你说",
  "bot": "MoltBot 回答",
  "greeting": "有什么可以帮你？",
  "greeting.sub": "中文或英文，想问就问。回答来自 {model}，就运行在你启动 MoltBot 的机器上。",
  "try.1.title": "认识 MoltBot",
  "try.1.text": "MoltBot 是什么，能做什么？",
  "try.2.title": "第一次 gRPC 调用",
  "try.2.text": "怎么用 Python 通过 gRPC 调用 MoltBot？",
  "try.3.title": "换上自己的模型",
  "try.3.text": "怎么使用我自己的模型？",
  "try.4.title": "接入团队聊天",
  "try.4.text": "怎么把 MoltBot 接入钉钉？",
  "composer.label": "给 MoltBot 的消息",
  "composer.placeholder": "给 MoltBot 发消息",
  "composer.hint": "Enter 发送 · Shift+Enter 换行 · {mod}K 新对话",
  "composer.note": "MoltBot 也会出错，重要内容请核实。",
  "send": "发送",
  "stop": "停止（Esc）",
  "stopping": "正在停止…",
  "jump": "回到最新",
  "copy": "复制",
  "copy.answer": "复制回答",
  "copy.code": "复制代码",
  "copied": "已复制",
  "copy.failed": "浏览器不允许复制",
  "code.plain": "文本",
  "thinking": "正在思考",
  "queued": "排队中，第 {position} 位",
  "queued.next": "排队中，下一个就是你",
  "reconnecting": "连接断开，正在重连…",
  "resuming": "正在接上之前的回答",
  "routed.plugin": "插件 {name}",
  "routed.skill": "技能 {name}",
  "routed.command": "命令 {name}",
  "tool.running": "正在运行 {tool}",
  "tool.done": "{tool} · {ms} 毫秒",
  "tool.failed": "{tool} 失败",
  "notice.failover": "{from} 没有回应，已切换到 {to}",
  "notice.other": "提示：{code}",
  "attachment": "附件：{name}",
  "reset": "回答已重新开始",
  "stopped": "已停止",
  "end.length": "回答达到了长度上限。",
  "end.filter": "其余内容被内容过滤器拦截。",
  "empty": "回答是空的。",
  "meta.model": "模型 {model}",
  "meta.first": "首字 {time}",
  "meta.total": "总计 {time}",
  "meta.tokens": "输入 {input}、输出 {output} 个 token",
  "meta.trimmed": "有 {n} 条较早的消息放不下",
  "retry": "重试",
  "resume": "继续",
  "reload": "重新加载对话",
  "error.title": "没有得到回答",
  "error.partial": "回答中断了",
  "error.link": "无法连接服务器。你的消息没有丢，也不会重复发送。",
  "error.link.accepted": "连接中途断开。MoltBot 仍在继续，可以接着取回这个回答。",
  "error.busy": "MoltBot 现在很忙，请在 {time}后重试。",
  "error.busy.soon": "MoltBot 现在很忙，请稍后重试。",
  "error.model": "模型没有回应。",
  "error.toolarge": "消息太长了。",
  "error.slow": "回答用时过长。",
  "error.forbidden": "没有权限执行这个操作。",
  "error.gone": "这个对话或回答已不存在。",
  "error.other": "出了点问题。",
  "error.detail": "详情：{detail}",
  "delete.title": "删除这个对话？",
  "delete.text": "“{title}”及其全部消息将从服务器上删除，无法恢复。",
  "delete.yes": "删除",
  "delete.failed": "对话删除失败。",
  "cancel": "取消",
  "link.picture": "图片：{alt}",
  "link.picture.bare": "图片",
  "announce.busy": "MoltBot 正在回答",
  "announce.stopped": "回答已停止",
  "announce.done": "回答结束",
  "signin.title": "登录 MoltBot",
  "signin.link": "最简单的方法：打开终端里 “moltbot start” 打印的链接。该链接只能用一次。",
  "signin.or": "或者粘贴访问密钥",
  "signin.key": "访问密钥",
  "signin.where": "“moltbot init” 已把密钥保存在工作区文件夹里。",
  "signin.go": "登录",
  "signin.wrong": "这里不认识这个密钥。",
  "signin.used": "这个链接已被使用或已过期。请重新运行 “moltbot start” 获取新链接，或粘贴密钥。",
  "signin.ended": "登录已过期，请重新登录。",
  "signin.down": "无法连接服务器。",
  "boot.down": "无法连接 MoltBot，页面会自动重试。",
  "seconds": "{n} 秒",
  "milliseconds": "{n} 毫秒",
};

const LANGUAGES = { en, zh };
let current = "en";

export const language = () => current;

/** The language for a browser's preferences: Chinese when Chinese is the first of the two that it names. */
export function preferred(tags) {
  for (const tag of tags) {
    const base = tag.toLowerCase().split("-")[0];
    if (base in LANGUAGES) return base;
  }
  return "en";
}

function fill(sentence, vars) {
  return sentence.replace(/\{(\w+)\}/g, (whole, name) => (name in vars ? String(vars[name]) : whole));
}

/** A sentence in the page's language, or in `inLanguage`. */
export function t(key, vars = {}, inLanguage = current) {
  return fill(LANGUAGES[inLanguage][key] ?? en[key] ?? key, vars);
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
  current = name in LANGUAGES ? name : "en";
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll(".i18n")) {
    for (const [attr, { key, vars }] of node[marked] ?? []) write(node, attr, key, vars);
  }
}

/** A duration for people. */
export function duration(ms) {
  if (ms < 1000) return t("milliseconds", { n: Math.round(ms) });
  return t("seconds", { n: (ms / 1000).toFixed(ms < 10_000 ? 1 : 0) });
}
