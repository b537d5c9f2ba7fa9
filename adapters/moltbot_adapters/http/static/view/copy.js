// A button that copies a text and says that it did.

import { copyText, h, icon } from "../dom.js";
import { label, say } from "../i18n.js";

const SHOWN_MS = 1_600;

/** A copy button; `labelKey` says what it copies, `read()` gives the text at the moment of the click. */
export function copyButton(labelKey, read) {
  const words = say(h("span"), "copy");
  const button = label(h("button", { class: "quiet copy" }, icon("copy"), words), labelKey);
  let timer = 0;
  const show = (name, key) => {
    button.replaceChild(icon(name), button.firstChild);
    say(words, key);
  };
  button.addEventListener("click", async () => {
    const done = await copyText(read());
    clearTimeout(timer);
    show(done ? "check" : "alert", done ? "copied" : "copy.failed");
    button.classList.toggle("done", done);
    timer = setTimeout(() => {
      show("copy", "copy");
      button.classList.remove("done");
    }, SHOWN_MS);
  });
  return button;
}
