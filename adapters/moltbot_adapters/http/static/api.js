// The HTTP calls of the page, one function each. Every failure is an ApiError or the browser's own network TypeError.

export const STORE_AWAY = "storage_unavailable";
const AWAY = new Set(["core_unavailable", "not_serving", "shutting_down", STORE_AWAY]);
const IN_VAIN = new Set(["insufficient_quota", "model_credential"]); // until somebody does something
const PAUSES_MS = [250, 500, 1_000, 2_000, 4_000]; // what is started again is back within them

/** A refusal by the server, in the four-key form of its errors. */
export class ApiError extends Error {
  constructor(status, error = {}, retryAfterMs = null) {
    super(error.message || `HTTP ${status}`);
    this.status = status;
    this.code = error.code || error.type || "";
    this.retryAfterMs = retryAfterMs;
  }

  /** Whether the same call may work in a moment without anyone doing anything. */
  get passing() {
    return (this.status === 429 || this.status >= 500) && !IN_VAIN.has(this.code);
  }

  /** Whether nobody refused anything: the server behind this one, or behind a proxy, is being started again. */
  get away() {
    return AWAY.has(this.code) || ([502, 503, 504].includes(this.status) && this.code === "");
  }
}

async function call(method, path, { body, headers = {}, signal } = {}) {
  const all = { Accept: "application/json, text/event-stream", ...headers };
  if (method !== "GET") all["X-MoltBot"] = "1";
  if (body !== undefined) all["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method, signal, headers: all, credentials: "same-origin", cache: "no-store",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({})); // a proxy's error page is not JSON
  const wait = Number(response.headers.get("Retry-After"));
  throw new ApiError(response.status, answer?.error ?? {}, wait > 0 ? wait * 1000 : null);
}

/** The outcome of a call that is safe to repeat, made again while the server is away, and for as long as its store is. */
async function patiently(made) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await made();
    } catch (error) {
      if (error.code !== STORE_AWAY && (tries === PAUSES_MS.length || (error instanceof ApiError && !error.away))) throw error;
    }
    dispatchEvent(new Event("moltbot:away"));
    await new Promise((resolve) => setTimeout(resolve, PAUSES_MS[tries] ?? 4_000));
  }
}

const json = async (...request) => (await call(...request)).json();
const part = encodeURIComponent;
const paged = (path, token) => (token ? `${path}?page_token=${part(token)}` : path);

export const me = () => json("GET", "/api/me");
export const logIn = (key) => call("POST", "/api/login", { body: { key } });
export const logOut = () => call("POST", "/api/logout");
export const listSessions = (token = "") => patiently(() => json("GET", paged("/api/sessions", token)));
export const deleteSession = (sid) => call("DELETE", `/api/sessions/${part(sid)}`);
export const cancelTurn = (sid, tid) => patiently(() => json("POST", `/api/sessions/${part(sid)}/turns/${part(tid)}/cancel`));

/** Every message of a session, oldest first. */
export async function listMessages(sid) {
  const messages = [];
  let token = "";
  do {
    const page = await patiently(() => json("GET", paged(`/api/sessions/${part(sid)}/messages`, token)));
    messages.push(...page.messages);
    token = page.next_page_token;
  } while (token);
  return messages;
}

/** Starts a turn, or attaches to the one that the same request id started; its body is an event stream. */
export const startTurn = (request, signal) => call("POST", "/api/turns", { body: request, signal });

/** The events of a turn after a sequence number: what was recorded, then live. */
export const turnEvents = (sid, tid, after, signal) =>
  call("GET", `/api/sessions/${part(sid)}/turns/${part(tid)}/events?after=${after}`, {
    signal, headers: after ? { "Last-Event-ID": String(after) } : {},
  });
