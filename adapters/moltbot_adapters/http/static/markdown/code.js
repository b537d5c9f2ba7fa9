// One fenced block: label, copy button, coloured lines. Lines are appended as they come; finished lines are never touched again.

import { h } from "../dom.js";
import { say } from "../i18n.js";
import { copyButton } from "../view/copy.js";
import { languageOf, tokenizeLine } from "./highlight.js";

const NAMES = {
  py: "python", js: "javascript", mjs: "javascript", ts: "typescript", sh: "bash", shell: "bash", zsh: "bash", console: "bash", yml: "yaml",
  "c++": "cpp", rs: "rust", golang: "go", htm: "html", patch: "diff", proto: "protobuf",
};

export class CodeView {
  constructor(lang) {
    this.lang = lang.toLowerCase();
    this.grammar = languageOf(this.lang);
    this.code = [];
    this.states = []; // the tokenizer's state before each line
    this.lines = [];
    this.body = h("code", { class: "code-text", attrs: { translate: "no" } });
    const name = h("span", { class: "code-lang" });
    if (lang) name.textContent = Object.hasOwn(NAMES, this.lang) ? NAMES[this.lang] : this.lang;
    else say(name, "code.plain");
    this.node = h(
      "figure", { class: "code" },
      h("figcaption", {}, name, copyButton("copy.code", () => this.code.join("\n"))),
      h("pre", { tabIndex: 0, dir: "ltr" }, this.body),
    );
  }

  /** Shows `code` (a list of lines); an `open` block still grows, so its last line may change. */
  update(code, open) {
    let same = 0;
    while (same < code.length && same < this.code.length && code[same] === this.code[same]) same += 1;
    while (this.lines.length > same) this.lines.pop().remove();
    const fresh = document.createDocumentFragment();
    for (let i = same; i < code.length; i += 1) {
      const { node, state } = this.#line(code[i], this.states[i] ?? "");
      this.states[i + 1] = state;
      this.lines.push(node);
      fresh.append(node);
    }
    this.body.append(fresh);
    this.code = open && code.at(-1) === "" ? code.slice(0, -1) : code;
    if (this.code.length < this.lines.length) this.lines.pop().remove();
  }

  #line(text, before) {
    const node = h("span", { class: "line" });
    const { tokens, state } = tokenizeLine(this.grammar, text, before);
    for (const [kind, value] of tokens) node.append(kind ? h("span", { class: `t-${kind}`, text: value }) : value);
    node.append("\n");
    return { node, state };
  }
}
