// Puts the page together: who is signed in, which chat the address names, the keys that work everywhere.

import { logOut, me } from "./api.js";
import { Chat } from "./chat.js";
import { h, icon } from "./dom.js";
import { label, modelName, preferred, say, speak, t, userName } from "./i18n.js";
import { store } from "./store.js";
import { Composer } from "./view/composer.js";
import { otherLanguage, Sidebar } from "./view/sidebar.js";
import { signInView } from "./view/signin.js";
import { Thread } from "./view/thread.js";

const THEMES = ["system", "light", "dark"];
const THEME_ICONS = { system: "screen", light: "sun", dark: "moon" };
const CHECK_MS = 4_000; // between two looks for a server that is away
const PHONE = matchMedia("(max-width: 800px)");
const root = document.getElementById("app");

function languageSwitch() {
  const name = h("span", { text: t("lang.name", {}, otherLanguage()) });
  const button = h("button", { class: "quiet worded" }, icon("globe"), name);
  label(button, "lang.switch");
  button.addEventListener("click", () => {
    store.language = otherLanguage();
    speak(store.language);
    name.textContent = t("lang.name", {}, otherLanguage());
    dispatchEvent(new Event("moltbot:language"));
  });
  return button;
}

function themeSwitch() {
  const words = h("span");
  const button = h("button", { class: "quiet worded" }, icon("screen"), words);
  const show = () => {
    const name = store.theme || "system";
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.replaceChild(icon(THEME_ICONS[name]), button.firstChild);
    const vars = { name: () => t(`theme.${name}`) };
    say(words, "theme", { vars });
    label(button, "theme", vars);
    const paper = getComputedStyle(document.body).backgroundColor;
    document.querySelector('meta[name="theme-color"]').content = paper;
  };
  button.addEventListener("click", () => {
    store.theme = THEMES[(THEMES.indexOf(store.theme || "system") + 1) % THEMES.length];
    show();
  });
  addEventListener("moltbot:language", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
  return button;
}

const lacking = ({ store_away: away }) => (away ? "waiting.store" : "");

/** The page of someone who is signed in. */
class Shell {
  constructor(person) {
    this.person = person;
    this.thread = new Thread({ onSuggestion: (text) => this.chat.send(text) });
    this.composer = new Composer({ onSend: (text) => this.chat.send(text), onStop: () => this.chat.stop() });
    this.sidebar = new Sidebar({
      onNew: () => this.newChat(), onClose: () => this.toggleSidebar(false), onDeleted: (sid) => sid === this.chat.session && this.chat.startNew(), controls: this.#controls(),
    });
    this.thread.modelName = () => modelName(person.default_model);
    this.chat = new Chat({
      thread: this.thread, composer: this.composer,
      hooks: { onSession: (sid) => this.#opened(sid), onChange: () => this.#listChanged(), onSignedOut: () => showSignIn("signin.ended") },
    });
    this.#build();
    for (const moment of ["focus", "online", "offline", "moltbot:away"]) addEventListener(moment, () => this.#check());
    document.addEventListener("visibilitychange", () => this.#check());
  }

  /** Says above the message box that the server or its store is away. */
  async #check() {
    if (document.hidden || this.checking || !this.node.isConnected) return;
    clearTimeout(this.timer);
    this.checking = true;
    const away = await me().then(lacking, ({ status }) => (status < 500 ? "" : "boot.down")); // a network error has no status
    this.checking = false;
    this.#warn(away);
  }

  #warn(key) {
    this.away.replaceChildren(...(key ? [icon("alert"), say(h("span"), key)] : []));
    if (key) this.timer = setTimeout(() => this.#check(), CHECK_MS);
  }

  #build() {
    this.title = h("h1", { class: "chat-name", dir: "auto" });
    this.opener = label(h("button", { class: "quiet square opener", attrs: { "aria-controls": "sidebar" }, on: { click: () => this.toggleSidebar(true) } }, icon("menu")), "sidebar.open");
    const fresh = label(h("button", { class: "quiet square", on: { click: () => this.newChat() } }, icon("plus")), "chat.new");
    const head = h("header", { class: "head" }, this.opener, this.title, this.#models(), fresh);
    this.away = h("p", { class: "away", attrs: { role: "status" } });
    this.composer.node.prepend(this.away);
    this.main = h("main", { class: "main" }, head, this.thread.node, this.composer.node);
    const scrim = h("div", { class: "scrim", on: { click: () => this.toggleSidebar(false) } });
    const skip = say(h("a", { href: "#message", class: "skip" }), "skip");
    skip.addEventListener("click", (event) => {
      event.preventDefault(); // the address belongs to the chat
      this.composer.focus();
    });
    this.node = h("div", { class: "shell" }, skip, this.sidebar.node, scrim, this.main);
    PHONE.addEventListener("change", () => this.#arrange(!PHONE.matches && !store.sidebarHidden));
    addEventListener("hashchange", () => this.route());
    document.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("moltbot:language", () => this.#named());
  }

  #models() {
    const models = this.person.models ?? [];
    if (models.length < 2) {
      store.model = ""; // there is nothing to choose: the server's own default counts
      return say(h("span", { class: "model-name" }), "named", { vars: { name: this.thread.modelName } });
    }
    const select = say(h("select", { class: "model-choice" }), "model", { attr: "aria-label" });
    for (const model of models) select.append(say(h("option", { value: model.id }), "named", { vars: { name: () => modelName(model) } }));
    select.value = models.some(({ id }) => id === store.model) ? store.model : this.person.default_model?.id;
    select.addEventListener("change", () => { store.model = select.value; });
    return select;
  }

  #controls() {
    const leave = h("button", { class: "quiet worded" }, icon("leave"), say(h("span"), "signout"));
    leave.addEventListener("click", async () => {
      await logOut().catch(() => undefined); // not reachable: the page still forgets what it shows
      store.lastSession = "";
      store.pending = null;
      location.assign("/");
    });
    const who = h("span", { class: "who", title: `MoltBot ${this.person.version ?? ""}`.trim() });
    say(who, "named", { vars: { name: () => userName(this.person.user) } });
    return h("div", { class: "sidebar-foot" }, languageSwitch(), themeSwitch(), who, leave);
  }

  async start() {
    root.replaceChildren(this.node);
    this.#arrange(!PHONE.matches && !store.sidebarHidden);
    this.composer.fill(store.draft);
    this.#warn(lacking(this.person));
    this.thread.note("chat.loading");
    const listed = this.#listChanged();
    if (!this.person.store_away) await listed;
    const { pending } = store;
    if (pending) await this.chat.sendPending(pending);
    else this.route(true);
  }

  /** Opens what the address names; a page without an address opens the chat that was open last. */
  route(first = false) {
    const named = /^#\/c\/(.+)$/.exec(location.hash);
    let sid = named?.[1] ?? "";
    if (first && !location.hash && (this.person.store_away || this.sidebar.find(store.lastSession))) sid = store.lastSession;
    if (!first && sid === this.chat.session) return;
    if (PHONE.matches) this.toggleSidebar(false);
    if (sid) this.chat.open(sid, this.sidebar.find(sid)?.active_turn);
    else this.chat.startNew();
  }

  newChat() {
    if (PHONE.matches) this.toggleSidebar(false);
    this.chat.startNew();
  }

  toggleSidebar(open) {
    if (!PHONE.matches) store.sidebarHidden = !open;
    const from = document.activeElement;
    const lost = from === document.body || this.sidebar.node.contains(from);
    this.#arrange(open);
    if (open) this.sidebar.node.querySelector("button").focus();
    else if (lost) (this.from?.isConnected ? this.from : this.opener).focus();
    this.from = open && !lost ? from : null;
  }

  #arrange(open) {
    this.node.classList.toggle("open", open);
    this.sidebar.node.inert = !open;
    this.main.inert = open && PHONE.matches;
    this.opener.setAttribute("aria-expanded", String(open));
  }

  #opened(sid) {
    const address = sid ? `#/c/${encodeURIComponent(sid)}` : "#/new";
    if (location.hash !== address) history.pushState(null, "", address);
    store.lastSession = sid;
    this.sidebar.select(sid);
    this.#named();
  }

  #named() {
    const session = this.sidebar.find(this.chat?.session ?? "");
    this.title.textContent = this.chat?.session ? session?.title || t("chat.untitled") : t("chat.new");
    document.title = session?.title ? `${session.title} · MoltBot` : "MoltBot";
  }

  async #listChanged() {
    await this.sidebar.refresh();
    this.#named();
  }

  #key(event) {
    if (document.querySelector("dialog[open]") || event.isComposing || !this.node.isConnected) return;
    const mod = event.ctrlKey || event.metaKey;
    if (event.key === "Escape") {
      if (PHONE.matches && this.node.classList.contains("open")) this.toggleSidebar(false);
      else this.chat.stop();
    } else if (mod && event.key.toLowerCase() === "k") {
      event.preventDefault();
      this.newChat();
    } else if (mod && event.key.toLowerCase() === "b") {
      event.preventDefault();
      this.toggleSidebar(!this.node.classList.contains("open"));
    } else if (mod && event.key === "/") {
      event.preventDefault();
      this.composer.focus();
    }
  }
}

function showSignIn(reason) {
  const onSignedIn = () => {
    history.replaceState(null, "", `/${location.hash}`); // the address loses ?error and keeps the chat
    location.reload();
  };
  const view = signInView({ reason, onSignedIn, languageSwitch: languageSwitch() });
  root.replaceChildren(view);
  view.querySelector("input").focus();
  addEventListener("moltbot:language", () => { if (view.isConnected) showSignIn(reason); }, { once: true });
}

async function boot() {
  speak(store.language || preferred(navigator.languages ?? [navigator.language]));
  for (let wait = 1_000; ; wait = Math.min(8_000, wait * 2)) {
    try {
      await new Shell(await me()).start();
      return;
    } catch (error) {
      if (error.status === 401) {
        showSignIn(new URLSearchParams(location.search).get("error") === "link" ? "signin.used" : "");
        return;
      }
      if (error.status === undefined && !(error instanceof TypeError && /fetch|network|load/i.test(error.message))) throw error;
      root.replaceChildren(say(h("p", { class: "boot-note", attrs: { role: "alert" } }), "boot.down"));
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

boot();
