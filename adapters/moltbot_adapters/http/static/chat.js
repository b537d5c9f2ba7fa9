// The conversation that is open: sends, follows the answer, stops it, and comes back to it after a reload or a broken line.

import { ApiError, listMessages, STORE_AWAY } from "./api.js";
import { duration } from "./i18n.js";
import { store } from "./store.js";
import { ConnectionLost, TurnFollower } from "./turn.js";

/** Sentences by the core's reason, by its status, and by the HTTP code or status of a refusal: the most telling one is looked up first. */
const WORDS = {
  CONTEXT_LENGTH_EXCEEDED: "error.context", CONTENT_TOO_LARGE: "error.toolarge", EMPTY_MESSAGE: "error.blank", QUEUE_FULL: "error.busy",
  MODEL_UNAVAILABLE: "error.model.away", STORAGE_FULL: "error.storage", STORAGE_UNAVAILABLE: "error.store", NOT_SERVING: "error.serving", CORE_UNAVAILABLE: "error.serving",
  UNAUTHENTICATED: "error.key", INVALID_API_KEY: "error.key", WORKSPACE_KEY_REFUSED: "error.key", DEADLINE_EXCEEDED: "error.slow",
  BUDGET_EXCEEDED: "error.budget", INSUFFICIENT_QUOTA: "error.budget", MODEL_CREDENTIAL: "error.credential",
  RESOURCE_EXHAUSTED: "error.busy", UNAVAILABLE: "error.model", PERMISSION_DENIED: "error.forbidden", NOT_FOUND: "error.gone",
  403: "error.forbidden", 404: "error.gone", 413: "error.toolarge", 429: "error.busy", 503: "error.model", 504: "error.slow", 507: "error.storage",
};
const REFUSED_TEXT = new Set(["CONTEXT_LENGTH_EXCEEDED", "CONTENT_TOO_LARGE", "EMPTY_MESSAGE"]); // other words may pass where these did not

export class Chat {
  /** `hooks`: onSession(sid) when the open chat changes, onChange() when the list of chats is stale, onSignedOut(). */
  constructor({ thread, composer, hooks }) {
    this.thread = thread;
    this.composer = composer;
    this.hooks = hooks;
    this.session = "";
    this.follower = null;
    this.visit = 0; // grows with every change of chat, so that late answers know that they are late
  }

  startNew() {
    this.#leave("");
    this.thread.welcome();
    this.composer.focus();
  }

  /** Opens a chat and, when its last message has no answer yet, follows that answer from its beginning. */
  async open(sid, activeTurn = null) {
    this.#leave(sid);
    const { visit } = this;
    this.thread.note("chat.loading");
    let messages;
    try {
      messages = await listMessages(sid);
    } catch (error) {
      if (visit === this.visit) this.#notOpened(error, sid, activeTurn);
      return;
    }
    if (visit !== this.visit) return;
    this.thread.show(messages);
    this.composer.focus();
    const answered = new Set(messages.filter((message) => message.role === "assistant").map((message) => message.turn));
    const last = messages.at(-1);
    const turn = activeTurn?.id ?? (last?.role === "user" ? last.turn : "");
    if (turn && !answered.has(turn)) await this.#follow(new Start({ session: sid, turn, text: last?.role === "user" ? last.text : "" }));
  }

  send(text) {
    const request = { session: this.session, text, request_id: uuid(), model: store.model };
    store.pending = request;
    return this.#ask(request);
  }

  /** Sends again what a reload interrupted before the server said that it has it. */
  async sendPending(request) {
    if (request.session) await this.open(request.session);
    else this.startNew();
    if (!this.follower) await this.#ask(request);
    else store.pending = null; // the open chat already waits for this answer
  }

  async stop() {
    if (!this.follower) return;
    this.composer.stopping();
    await this.follower.stop();
  }

  #ask(request) {
    this.thread.ask(request.text);
    return this.#follow(new Start({ request, text: request.text }));
  }

  #leave(sid) {
    this.visit += 1;
    this.follower?.detach();
    this.follower = null;
    this.composer.busy = false;
    this.session = sid;
    this.hooks.onSession(sid);
  }

  #notOpened(error, sid, activeTurn) {
    if (error.status === 401) this.hooks.onSignedOut();
    else if (error.status === 404) {
      this.#leave("");
      this.thread.note("chat.gone");
    } else this.thread.answer().fail({ key: "error.link", action: "reload", onAction: () => this.open(sid, activeTurn) });
  }

  async #follow(start) {
    const view = this.thread.answer(start.request ? "thinking" : "resuming");
    const follower = new TurnFollower(start, {
      onEvent: (kind, data) => this.#tell(view, kind, data, start),
      onLink: (up, was, code) => (!up ? view.say(code === STORE_AWAY ? "waiting.store" : "reconnecting") : view.text ? view.quiet() : was || view.say("thinking")),
    });
    await this.#run(follower, view, start);
  }

  async #run(follower, view, start) {
    this.follower = follower;
    this.composer.busy = true;
    const { visit } = this;
    let end;
    try {
      end = await follower.run();
    } catch (error) {
      if (visit === this.visit) this.#broken(error, follower, view, start);
      end = "broken";
    }
    if (visit !== this.visit) return;
    if (end === "stopped") {
      view.complete(null, true);
      if (!follower.accepted) store.pending = null;
    }
    this.thread.announceEnd(end === "completed" ? "announce.done" : end === "stopped" ? "announce.stopped" : "error.title");
    this.follower = null;
    this.composer.busy = false;
    this.hooks.onChange();
  }

  /** One event of the turn. Kinds that this page does not know are skipped: newer servers may have more. */
  #tell(view, kind, data, start) {
    if (kind === "accepted") this.#accepted(data);
    else if (kind === "queued") view.say(data.position > 1 ? "queued" : "queued.next", { position: data.position });
    else if (kind === "routed") routed(view, data);
    else if (kind === "text_delta") view.append(data.text);
    else if (kind === "reset") view.replace(data.text);
    else if (kind === "reasoning_delta") view.think(data.text);
    else if (kind === "attachment") view.attach(data.part);
    else if (kind === "tool_started") view.toolStarted(data);
    else if (kind === "tool_finished") view.toolFinished(data);
    else if (kind === "notice") noticed(view, data);
    else if (kind === "completed") view.complete(data);
    else if (kind === "failed") this.#failed(view, data, start);
  }

  #accepted({ session }) {
    store.pending = null;
    if (!session || session === this.session) return;
    this.session = session;
    this.hooks.onSession(session);
    this.hooks.onChange();
  }

  #failed(view, { code, message, reason, retryable, retry_after_ms: wait }, start) {
    const again = retryable && start.text ? { onAction: () => this.#again(view, start, reason) } : {};
    view.fail({ ...sentence([reason, code], wait), detail: message || reason || code, ...(REFUSED_TEXT.has(reason) ? this.#giveBack(start) : again) });
  }

  /** Puts a refused text back into the box; where that would surprise (a chat of the past, another draft), a button does it. */
  #giveBack({ request, text }) {
    if (!text || (request && this.composer.restore(text))) return {};
    return { action: "edit", onAction: () => this.composer.prepend(text) };
  }

  /** The turn itself failed: trying again is a new turn with the same words, or the same turn when a stop of the core cut it off. */
  #again(view, start, reason) {
    if (this.follower) return;
    if (reason !== "TURN_INTERRUPTED" || !start.request) {
      this.send(start.text);
      return;
    }
    view.node.remove();
    store.pending = start.request;
    this.#follow(start);
  }

  /** No end was heard. Not accepted: the same request id goes out again. Accepted: its events are picked up where they stopped. */
  #broken(error, follower, view, start) {
    if (error.status === 401) {
      this.hooks.onSignedOut();
      return;
    }
    const again = () => {
      if (this.follower) return;
      view.begin(follower.accepted ? "resuming" : "thinking");
      this.#run(follower, view, start);
    };
    if (error instanceof ConnectionLost || !(error instanceof ApiError)) {
      const key = follower.accepted ? "error.link.accepted" : "error.link";
      view.fail({ key, action: follower.accepted ? "resume" : "retry", onAction: again });
      return;
    }
    let wayOn = { onAction: again };
    if (!error.passing) {
      if (!follower.accepted) store.pending = null;
      wayOn = follower.accepted ? {} : this.#giveBack(start);
    }
    view.fail({ ...sentence([error.code.toUpperCase(), error.status], error.retryAfterMs), detail: error.message, ...wayOn });
  }
}

/** The sentence for the first of `names` that has one, and when to come back where the server said it. */
function sentence(names, wait) {
  const key = WORDS[names.find((name) => Object.hasOwn(WORDS, name))] ?? "error.other";
  if (key !== "error.busy") return { key };
  return wait ? { key, vars: { time: duration(wait) } } : { key: "error.busy.soon" };
}

/** How a turn is joined: by a request that may start it, or by its name; with the words that asked for it. */
class Start {
  constructor({ request = null, session = "", turn = "", text = "" }) {
    Object.assign(this, { request, session, turn, text });
  }
}

function routed(view, { model, plugin, skill, command }) {
  if (model) view.model = model;
  else if (plugin) view.chip("bolt", "routed.plugin", { name: plugin });
  else if (skill) view.chip("bolt", "routed.skill", { name: skill });
  else if (command) view.chip("bolt", "routed.command", { name: command });
}

function noticed(view, { code, from, to, reason }) {
  if (from && to) view.notice("swap", reason ? "notice.switch" : "notice.switch.bare", { from, to, reason });
  else view.notice("alert", "notice.other", { what: reason || code });
}

/** A random request id; crypto.randomUUID exists only on https and localhost. */
function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  return [...bytes].map((byte, i) => ([4, 6, 8, 10].includes(i) ? "-" : "") + byte.toString(16).padStart(2, "0")).join("");
}
