// The sign-in page: open the printed link, or paste a key. It speaks both languages, for nobody has chosen one yet.

import { ApiError, logIn } from "../api.js";
import { h, icon, mark } from "../dom.js";
import { say, t } from "../i18n.js";
import { otherLanguage } from "./sidebar.js";

/** The page for someone who is not signed in. `reason` is the key of a sentence to show first, or "". */
export function signInView({ reason, onSignedIn, languageSwitch }) {
  const key = h("input", { type: "password", id: "key", name: "key", required: true, autocomplete: "current-password", spellcheck: false });
  const go = say(h("button", { type: "submit", class: "button primary" }), "signin.go");
  const problem = h("p", { class: "signin-problem", attrs: { role: "alert" } });
  const show = (key, ...more) => problem.replaceChildren(icon("alert"), h("span", {}, say(h("span"), key), " ", ...more));
  if (reason) show(reason);
  const form = h(
    "form", { class: "signin-form" },
    h("div", { class: "signin-or" }, say(h("span"), "signin.or")),
    say(h("label", { htmlFor: "key" }), "signin.key"), h("div", { class: "signin-row" }, key, go),
    say(h("p", { class: "signin-where" }), "signin.where"),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    try {
      await logIn(key.value.trim());
      onSignedIn();
    } catch (error) {
      if (error.status === 401) show("signin.wrong");
      else if (!(error instanceof ApiError) || error.away) show("signin.down");
      else show("error.forbidden", say(h("span"), "error.detail", { vars: { detail: error.message } }));
      key.select();
      go.disabled = false;
    }
  });
  const second = otherLanguage();
  const also = h("div", { class: "signin-also", lang: second === "zh" ? "zh-CN" : "en" });
  for (const sentence of ["signin.link", "signin.where"]) also.append(h("p", { text: t(sentence, {}, second) }));
  const card = h(
    "section", { class: "signin-card" },
    mark(), say(h("h1"), "signin.title"), problem, say(h("p", { class: "signin-lead" }), "signin.link"), form, also,
  );
  return h("main", { class: "signin" }, card, languageSwitch);
}
