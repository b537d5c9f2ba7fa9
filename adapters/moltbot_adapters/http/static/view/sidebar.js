// The list of past chats, and the small controls under it.

import { deleteSession, listSessions } from "../api.js";
import { h, icon, mark } from "../dom.js";
import { label, language, say } from "../i18n.js";
import { confirmDelete } from "./dialog.js";

const DAY = 86_400_000;
const REFRESH_MS = 5_000;

export class Sidebar {
  constructor({ onNew, onClose, onDeleted, controls }) {
    this.onDeleted = onDeleted;
    this.sessions = [];
    this.next = "";
    this.selected = "";
    const close = label(h("button", { class: "quiet square", on: { click: onClose } }, icon("menu")), "sidebar.close");
    const fresh = h("button", { class: "button new-chat", on: { click: onNew } }, icon("plus"), say(h("span"), "chat.new"));
    const brand = h("div", { class: "brand" }, mark(), h("span", { text: "MoltBot" }));
    this.list = h("div", { class: "chat-list" });
    this.more = say(h("button", { class: "quiet more", hidden: true, on: { click: () => this.#older() } }), "chats.more");
    const scroll = h("div", { class: "chat-scroll" }, this.list, this.more);
    const nav = say(h("nav", {}, scroll), "chats", { attr: "aria-label" });
    this.node = h("aside", { class: "sidebar", id: "sidebar" }, h("div", { class: "sidebar-head" }, brand, close), fresh, nav, controls);
    document.addEventListener("visibilitychange", () => { if (!document.hidden && this.timer) this.refresh(); });
  }

  find(sid) {
    return this.sessions.find((session) => session.id === sid);
  }

  /** Loads the newest page again; older ones stay. Answers if it worked. */
  async refresh() {
    clearTimeout(this.timer);
    this.timer = 0;
    try {
      const page = await listSessions();
      const ids = new Set(page.sessions.map((session) => session.id));
      const last = page.sessions.at(-1)?.update_time ?? "";
      const older = page.next_page_token ? this.sessions.filter((known) => !ids.has(known.id) && known.update_time < last) : [];
      this.sessions = [...page.sessions, ...older];
      if (!older.length) this.next = page.next_page_token;
      this.#draw();
      return true;
    } catch (error) {
      if (error.status !== 401) this.timer = setTimeout(() => this.refresh(), REFRESH_MS);
      if (!this.sessions.length) this.list.replaceChildren(say(h("p", { class: "list-note" }), "chats.failed"));
      return false;
    }
  }

  select(sid) {
    this.selected = sid;
    for (const link of this.list.querySelectorAll("a")) mind(link, sid);
  }

  async #older() {
    this.more.disabled = true;
    try {
      const page = await listSessions(this.next);
      this.sessions.push(...page.sessions.filter((session) => !this.find(session.id)));
      this.next = page.next_page_token;
      this.#draw();
    } finally {
      this.more.disabled = false;
    }
  }

  #draw() {
    const focused = document.activeElement?.closest?.(".chat-row")?.dataset.session;
    const groups = new Map();
    for (const session of this.sessions) {
      const key = dayOf(session.update_time);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(this.#row(session));
    }
    const nodes = [...groups].map(([key, rows]) => h("section", {}, say(h("h2"), key), h("ul", {}, ...rows)));
    if (!nodes.length) nodes.push(say(h("p", { class: "list-note" }), "chats.none"));
    this.list.replaceChildren(...nodes);
    this.more.hidden = !this.next;
    if (focused) this.list.querySelector(`[data-session="${CSS.escape(focused)}"] a`)?.focus();
    const elsewhere = this.sessions.some((session) => session.active_turn && session.id !== this.selected);
    if (elsewhere && !document.hidden) this.timer = setTimeout(() => this.refresh(), REFRESH_MS);
  }

  #row(session) {
    const name = h("span", { class: "chat-title", dir: "auto" });
    if (session.title) name.textContent = session.title;
    else say(name, "chat.untitled");
    const link = h("a", { href: `#/c/${encodeURIComponent(session.id)}`, class: "chat-link", title: session.title }, name);
    link.dataset.session = session.id;
    mind(link, this.selected);
    if (session.active_turn) link.append(label(h("span", { class: "pulse", attrs: { role: "img" } }), "chat.running"));
    const remove = label(h("button", { class: "quiet square small", on: { click: () => this.#remove(session, name.textContent) } }, icon("trash")), "chat.delete", { title: name.textContent });
    const row = h("li", { class: "chat-row" }, link, remove);
    row.dataset.session = session.id;
    return row;
  }

  async #remove(session, title) {
    if (!(await confirmDelete(title))) return;
    try {
      await deleteSession(session.id);
    } catch (error) {
      if (error.status !== 404) {
        this.list.prepend(say(h("p", { class: "list-note bad", attrs: { role: "alert" } }), "delete.failed"));
        return;
      }
    }
    this.sessions = this.sessions.filter((known) => known.id !== session.id);
    this.#draw();
    this.onDeleted(session.id);
    await this.refresh();
  }
}

function mind(link, sid) {
  if (link.dataset.session === sid) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const then = Date.parse(time);
  if (!(then < midnight)) return "day.today";
  if (then >= midnight - DAY) return "day.yesterday";
  return then >= midnight - 7 * DAY ? "day.week" : "day.older";
}

/** The language that the switch leads to. */
export const otherLanguage = () => (language() === "zh" ? "en" : "zh");
