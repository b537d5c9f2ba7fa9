// What a model thought before it answered: folded, plain text, apart from the answer.

import { h } from "../dom.js";
import { say } from "../i18n.js";

export class Thoughts {
  constructor() {
    this.said = h("div", { class: "thoughts-text", dir: "auto" });
    this.node = h("details", { class: "thoughts", hidden: true }, say(h("summary"), "thoughts"), this.said);
  }

  append(text) {
    this.said.append(text); // as a text node of its own: nothing that is there is written again
    if (text.trim()) this.node.hidden = false;
  }

  clear() {
    this.said.replaceChildren();
    this.node.hidden = true;
  }

  /** The end of the turn has all of it; what was shown already stays as it is. */
  whole(text) {
    if (!text || this.said.textContent === text) return;
    this.clear();
    this.append(text);
  }
}
