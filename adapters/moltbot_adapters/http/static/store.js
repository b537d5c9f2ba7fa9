// What this browser remembers: preferences, the draft and the turn that is on its way. Nothing secret is kept here.

const LASTING = () => localStorage;
const PASSING = () => sessionStorage; // each tab has its own

/** name -> [where, key, value when there is none]. */
const PLACES = {
  theme: [LASTING, "theme", ""],
  language: [LASTING, "language", ""],
  model: [LASTING, "model", ""],
  sidebarHidden: [LASTING, "sidebar", false],
  lastSession: [LASTING, "last", ""], // a page without an address of its own opens it again
  draft: [PASSING, "draft", ""],
  pending: [PASSING, "pending", null], // sent and not yet accepted: a reload sends it again with the same request id
};

export const store = {};

for (const [name, [where, key, none]] of Object.entries(PLACES)) {
  let kept = none; // stands in when storage is blocked or full
  Object.defineProperty(store, name, {
    get() {
      try {
        const text = where().getItem(`moltbot.${key}`);
        return text === null ? kept : JSON.parse(text);
      } catch {
        return kept;
      }
    },
    set(value) {
      kept = value;
      try {
        where().setItem(`moltbot.${key}`, JSON.stringify(value));
      } catch {
        // The value lives as long as the page.
      }
    },
  });
}
