// Follows one turn to its end through broken connections: no event is lost, none is told twice.

import { ApiError, cancelTurn, startTurn, STORE_AWAY, turnEvents } from "./api.js";
import { readEvents } from "./sse.js";

const SILENCE_MS = 45_000; // three missed pings: the connection is dead though nobody said so
const ATTEMPTS = 16; // about a minute of trying
const LONGEST_PAUSE_MS = 4_000;
const UNACCEPTED_STOP_MS = 1_500;
const CANCEL_GRACE_MS = 5_000;
const LAST_KINDS = new Set(["completed", "failed"]);

/** The server cannot be reached, and the page has stopped trying by itself. */
export class ConnectionLost extends Error {}

/** One turn as this page sees it. `onEvent(kind, data)` hears each event once and in order; `onLink(up, was, code)` hears the connection, and the code of what refused. */
export class TurnFollower {
  /** `start` is either {request} for a new turn or {session, turn} for one that already runs. */
  constructor({ request = null, session = "", turn = "" }, { onEvent, onLink }) {
    this.request = request;
    this.session = session || request?.session || "";
    this.turn = turn;
    this.last = 0;
    this.stopping = false;
    this.detached = false;
    this.onEvent = onEvent;
    this.onLink = onLink;
    this.abort = new AbortController();
    this.linked = true; // until it is known better
    this.code = ""; // of what refused last
  }

  get accepted() {
    return this.turn !== "";
  }

  /** Follows to the end. Answers "completed", "failed", "stopped" (given up on after a stop) or "detached"; throws ApiError or ConnectionLost. */
  async run() {
    for (let attempt = 0; ;) {
      const before = this.last;
      let code = "";
      let refused = false;
      try {
        const end = await this.#follow();
        if (end) return end;
      } catch (error) {
        if (this.detached) return this.stopping ? "stopped" : "detached";
        refused = error instanceof ApiError && !error.away;
        if (refused && (!error.passing || attempt >= 2)) throw error;
        code = error.code ?? "";
      }
      if (this.detached) return this.stopping ? "stopped" : "detached";
      attempt = this.last > before ? 1 : attempt + 1;
      if (attempt > ATTEMPTS && code !== STORE_AWAY) throw new ConnectionLost();
      if (!refused) this.#link(false, code); // who refuses was reached
      await this.#pause(Math.min(LONGEST_PAUSE_MS, 125 * 2 ** attempt) * (0.75 + Math.random() / 2));
      if (this.detached) return this.stopping ? "stopped" : "detached";
    }
  }

  /** Leaves; the turn goes on at the server. */
  detach() {
    this.detached = true;
    this.abort.abort();
  }

  /** Asks the server to stop. What is already shown stays; the last event still comes when the server answers. */
  async stop() {
    if (this.stopping) return;
    this.stopping = true;
    if (!this.accepted) {
      setTimeout(() => this.accepted || this.detach(), UNACCEPTED_STOP_MS);
      return;
    }
    await this.#cancel();
  }

  async #cancel() {
    setTimeout(() => this.detach(), CANCEL_GRACE_MS); // harmless after the end
    try {
      await cancelTurn(this.session, this.turn);
    } catch {
      this.detach(); // it cannot be told: the page stops listening, as it was asked
    }
  }

  async #follow() {
    const link = new AbortController();
    const drop = () => link.abort();
    this.abort.signal.addEventListener("abort", drop, { once: true });
    if (this.abort.signal.aborted) link.abort();
    let timer = setTimeout(drop, SILENCE_MS);
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(drop, SILENCE_MS);
    };
    try {
      const response = this.accepted
        ? await turnEvents(this.session, this.turn, this.last, link.signal)
        : await startTurn(this.request, link.signal);
      if (!this.code) this.#link(true); // one that lacks its store answers too
      if (response.status === 204) return "completed"; // nothing comes any more
      for await (const frame of readEvents(response.body, alive)) {
        if (frame.event === "refused") {
          const { status, error } = JSON.parse(frame.data);
          throw new ApiError(status, error);
        }
        if (!this.linked) this.#link(true);
        const kind = this.#take(frame);
        if (LAST_KINDS.has(kind)) return kind;
      }
      return "";
    } finally {
      clearTimeout(timer);
      this.abort.signal.removeEventListener("abort", drop);
    }
  }

  #link(up, code = "") {
    const was = this.linked;
    this.linked = up;
    this.code = code;
    this.onLink(up, was, code);
  }

  #take(frame) {
    const data = JSON.parse(frame.data);
    const sequence = data.sequence ?? Number(frame.id);
    if (sequence <= this.last) return ""; // told before the connection broke
    this.last = sequence;
    if (frame.event === "accepted") {
      this.turn = data.turn;
      this.session = data.session || this.session;
      if (this.stopping) this.#cancel();
    }
    try {
      this.onEvent(frame.event, data);
    } catch (error) {
      reportError(error); // a fault of the page in one event is not a broken connection, and the rest still counts
    }
    return frame.event;
  }

  #pause(ms) {
    return new Promise((resolve) => {
      const done = () => {
        clearTimeout(timer);
        removeEventListener("online", done);
        this.abort.signal.removeEventListener("abort", done);
        resolve();
      };
      const timer = setTimeout(done, ms);
      addEventListener("online", done); // the network is back: no reason to wait
      this.abort.signal.addEventListener("abort", done);
      if (this.abort.signal.aborted) done();
    });
  }
}
