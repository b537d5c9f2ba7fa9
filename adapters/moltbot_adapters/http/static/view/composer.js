// The message box: Enter sends, Shift+Enter breaks the line, and an input method keeps its Enter.

import { h, icon } from "../dom.js";
import { label, say } from "../i18n.js";
import { store } from "../store.js";

const TALLEST = 220; // px before the box scrolls inside

export class Composer {
  constructor({ onSend, onStop }) {
    this.onSend = onSend;
    this.onStop = onStop;
    this.running = false;
    this.box = h("textarea", { id: "message", rows: 1, value: store.draft, autocomplete: "off", dir: "auto", attrs: { enterkeyhint: "send" } });
    say(say(this.box, "composer.placeholder", { attr: "placeholder" }), "composer.label", { attr: "aria-label" });
    this.sendButton = label(h("button", { type: "submit", class: "round send" }, icon("send")), "send");
    this.stopButton = label(h("button", { class: "round stop", hidden: true, on: { click: () => this.onStop() } }, icon("stop")), "stop");
    const mod = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl+";
    const hint = h("p", { class: "hint" }, say(h("span", { class: "hint-keys" }), "composer.hint", { vars: { mod } }), say(h("span"), "composer.note"));
    const form = h("form", { class: "composer" }, this.box, this.sendButton, this.stopButton);
    this.held = h("p", { class: "held", attrs: { role: "status" } }); // in the page from the start: later ones are not read out
    this.node = h("div", { class: "composer-dock" }, this.held, form, hint);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    form.addEventListener("mousedown", (event) => {
      if (event.target !== form) return;
      event.preventDefault();
      this.focus();
    });
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("input", () => this.#changed());
    this.#changed();
  }

  /** While an answer is written, the send button is a stop button; the next message can be typed meanwhile. */
  set busy(value) {
    const hadFocus = document.activeElement === this.stopButton || document.activeElement === this.sendButton;
    this.running = value;
    this.held.replaceChildren();
    this.stopButton.hidden = !value;
    this.stopButton.disabled = false;
    this.sendButton.hidden = value;
    label(this.stopButton, "stop");
    if (hadFocus) this.focus();
  }

  stopping() {
    this.stopButton.disabled = true;
    label(this.stopButton, "stopping");
    if (this.held.firstChild) this.#hold();
  }

  /** Gives a text back for editing, unless something else was typed already; answers whether the text is in the box now. */
  restore(text) {
    if (this.box.value.trim() === "") this.fill(text);
    return this.box.value === text;
  }

  /** Puts a text before what was typed, at most once, and goes there. */
  prepend(text) {
    if (!this.box.value.startsWith(text)) this.fill([text, this.box.value].filter(Boolean).join("\n\n"));
    this.focus();
  }

  /** Writes into the box, which measures itself. */
  fill(text) {
    this.box.value = text;
    this.#changed();
  }

  focus() {
    this.box.focus({ preventScroll: true });
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.altKey) return;
    if (event.isComposing || event.keyCode === 229) return; // Enter picks a word in the input method
    event.preventDefault();
    this.#send();
  }

  #send() {
    const text = this.box.value.trim();
    if (text === "") return;
    if (this.running) {
      this.#hold();
      return;
    }
    this.fill("");
    this.onSend(text);
  }

  /** Says why a message stays in the box, with a new node each time, so that each Enter is read out. */
  #hold() {
    this.held.replaceChildren(say(h("span"), this.stopButton.disabled ? "stopping" : "held"));
  }

  #changed() {
    store.draft = this.box.value;
    this.held.replaceChildren();
    this.sendButton.disabled = this.box.value.trim() === "";
    this.box.style.height = "auto";
    const height = Math.min(TALLEST, this.box.scrollHeight);
    if (height) this.box.style.height = `${height}px`;
    this.box.classList.toggle("tall", this.box.scrollHeight > TALLEST);
  }
}
