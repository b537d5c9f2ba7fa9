// Keeps the newest line in sight until the reader scrolls up, and offers the way back.

const NEAR = 48; // px from the end that count as being there

export class EndFollower {
  constructor(scroller, content, button) {
    this.scroller = scroller;
    this.button = button;
    this.stuck = true;
    this.top = 0;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    scroller.addEventListener("wheel", (event) => { if (event.deltaY < 0 && scroller.scrollHeight > scroller.clientHeight + 1) this.#let(); }, { passive: true });
    button.addEventListener("click", () => this.jump(true));
    const watcher = new ResizeObserver(() => this.follow());
    watcher.observe(content);
    watcher.observe(scroller);
  }

  /** Call after content grew. */
  follow() {
    if (this.stuck) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#show();
  }

  /** Goes to the end and stays there; a welcome is read from its top. */
  jump(gently = false) {
    this.stuck = !this.scroller.querySelector(".welcome");
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.scroller.scrollTo({ top: this.stuck ? this.scroller.scrollHeight : 0, behavior: gently && !calm ? "smooth" : "instant" });
    this.#show();
  }

  #distance() {
    return this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight;
  }

  #scrolled() {
    const up = this.scroller.scrollTop < this.top - 1;
    this.top = this.scroller.scrollTop;
    if (up && this.#distance() > 2) this.#let();
    else if (!up && this.#distance() < NEAR) this.stuck = true;
    this.#show();
  }

  #let() {
    this.stuck = false;
    this.#show();
  }

  #show() {
    this.button.hidden = this.stuck || this.#distance() < NEAR;
  }
}
