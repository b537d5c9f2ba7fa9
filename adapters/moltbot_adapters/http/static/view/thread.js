// The conversation: its messages, the empty state with suggestions, and the words for screen readers.

import { h, icon, mark } from "../dom.js";
import { say, t } from "../i18n.js";
import { AnswerView, questionView } from "./answer.js";
import { EndFollower } from "./scroll.js";

const SHOWN = 60; // messages drawn when a chat opens; earlier ones wait for a click
const SUGGESTIONS = [["chat", "try.1"], ["bolt", "try.2"], ["code", "try.3"], ["globe", "try.4"]];

export class Thread {
  constructor({ onSuggestion }) {
    this.onSuggestion = onSuggestion;
    this.modelName = () => "MoltBot";
    this.list = h("div", { class: "thread" });
    this.scroller = h("div", { class: "scroller", tabIndex: -1 }, this.list);
    const jump = h("button", { class: "jump", hidden: true }, icon("down"), say(h("span"), "jump"));
    this.live = h("div", { class: "visually-hidden", attrs: { "aria-live": "polite", "aria-atomic": "false", role: "log" } });
    this.node = h("div", { class: "thread-place" }, this.scroller, jump, this.live);
    this.end = new EndFollower(this.scroller, this.list, jump);
  }

  /** A new chat: a greeting and something to begin with. */
  welcome() {
    const cards = SUGGESTIONS.map(([shape, key]) => {
      const words = h("span", { class: "card-words" }, say(h("strong"), `${key}.title`), say(h("span"), `${key}.text`));
      return h("button", { class: "card", on: { click: () => this.onSuggestion(t(`${key}.text`)) } }, icon(shape), words);
    });
    const sub = say(h("p", { class: "welcome-sub" }), "greeting.sub", { vars: { model: this.modelName } });
    this.#put(h("section", { class: "welcome" }, mark(), say(h("h2"), "greeting"), sub, h("div", { class: "cards" }, ...cards)));
  }

  note(key) {
    this.#put(say(h("p", { class: "thread-note" }), key));
  }

  #put(...nodes) {
    this.list.replaceChildren(...nodes);
    this.live.replaceChildren();
    this.end.jump();
  }

  /** Shows a chat from the past, newest message in sight. */
  show(messages) {
    const recent = messages.slice(-SHOWN);
    const earlier = messages.slice(0, -SHOWN);
    const nodes = recent.map(draw);
    if (earlier.length) nodes.unshift(this.#earlier(earlier));
    this.#put(...nodes);
  }

  #earlier(messages) {
    const button = say(h("button", { class: "button earlier" }), "chat.earlier");
    button.addEventListener("click", () => {
      const height = this.scroller.scrollHeight;
      const chunk = messages.splice(-SHOWN);
      button.after(...chunk.map(draw));
      this.scroller.scrollTop += this.scroller.scrollHeight - height; // what was being read stays where it was
      if (messages.length === 0) button.remove();
    });
    return button;
  }

  ask(text) {
    this.list.querySelector(".welcome, .thread-note")?.remove();
    this.list.append(questionView(text));
    this.end.jump();
  }

  /** A new answer at the end, growing. */
  answer(key) {
    this.list.querySelector(".thread-note")?.remove();
    const view = new AnswerView({ onDrawn: () => this.end.follow(), onSettled: (nodes) => this.#announce(nodes) });
    view.begin(key);
    this.list.append(view.node);
    this.live.replaceChildren(h("p", { text: t("announce.busy") }));
    this.end.follow();
    return view;
  }

  announceEnd(key) {
    this.live.append(h("p", { text: t(key) }));
  }

  /** Screen readers hear whole paragraphs as they are finished, never half words. */
  #announce(nodes) {
    for (const node of nodes) this.live.append(h("p", { text: node.textContent.slice(0, 2_000) }));
    while (this.live.childElementCount > 20) this.live.firstChild.remove();
  }
}

function draw(message) {
  return message.role === "user" ? questionView(message.text) : AnswerView.finished(message).node;
}
