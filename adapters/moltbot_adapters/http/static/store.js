// What this browser remembers: preferences, the draft and the turn that is on its way. Nothing secret is kept here.

const memory = new Map(); // stands in when storage is blocked

function read(storage, name, fallback) {
  try {
    const text = storage().getItem(`moltbot.${name}`);
    return text === null ? (memory.get(name) ?? fallback) : JSON.parse(text);
  } catch {
    return memory.get(name) ?? fallback;
  }
}

function write(storage, name, value) {
  memory.set(name, value);
  try {
    storage().setItem(`moltbot.${name}`, JSON.stringify(value));
  } catch {
    // Blocked or full: the value lives as long as the page.
  }
}

const lasting = () => localStorage;
const passing = () => sessionStorage;

export const store = {
  get theme() { return read(lasting, "theme", ""); },
  set theme(value) { write(lasting, "theme", value); },
  get language() { return read(lasting, "language", ""); },
  set language(value) { write(lasting, "language", value); },
  get model() { return read(lasting, "model", ""); },
  set model(value) { write(lasting, "model", value); },
  /** The session that was open last; a page without an address of its own opens it again. */
  get lastSession() { return read(lasting, "last", ""); },
  set lastSession(value) { write(lasting, "last", value); },
  get sidebarHidden() { return read(lasting, "sidebar", false); },
  set sidebarHidden(value) { write(lasting, "sidebar", value); },
  get draft() { return read(passing, "draft", ""); },
  set draft(value) { write(passing, "draft", value); },
  /** The request that was sent and not yet accepted: a reload sends it again with the same request id. */
  get pending() { return read(passing, "pending", null); },
  set pending(value) { write(passing, "pending", value); },
};
