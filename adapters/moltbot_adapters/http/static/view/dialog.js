// A question in the page, with the browser's own focus trap and Escape.

import { h } from "../dom.js";
import { say } from "../i18n.js";

/** Asks before a chat is deleted; answers true when the person agreed. */
export function confirmDelete(title) {
  const heading = say(h("h2", { id: "dialog-title" }), "delete.title");
  const text = say(h("p", { id: "dialog-text" }), "delete.text", { vars: { title } });
  const cancel = say(h("button", { class: "button", on: { click: () => dialog.close() } }), "cancel");
  const agree = say(h("button", { class: "button danger", on: { click: () => dialog.close("yes") } }), "delete.yes");
  const dialog = h(
    "dialog", { class: "dialog", attrs: { "aria-labelledby": "dialog-title", "aria-describedby": "dialog-text" } },
    heading, text, h("div", { class: "dialog-buttons" }, cancel, agree),
  );
  document.body.append(dialog);
  return new Promise((resolve) => {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    dialog.showModal();
    cancel.focus();
  });
}
