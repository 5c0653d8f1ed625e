// @ts-check
/** This client's scans, newest first, each kept up to date by its events. */

import { find, findButton, make, makeTime, setText } from "./dom.js";
import { describeParams, formatDuration, formatOrdinal, formatPercent, formatWhole, isSynthetic, moment } from "./format.js";
import { Standing } from "./progress.js";
import { scanwire } from "./server.js";

/** @import { Scanners, Snapshot } from "../scanwire.d.ts" */

/** @typedef {{ standing: Standing, element: HTMLTableRowElement, state: HTMLElement, matches: HTMLElement, duration: HTMLElement, params: HTMLElement, end: () => void }} Line */

const LOOK_EVERY_MS = 15_000; // for scans that were submitted elsewhere
const TICK_MS = 500;
const PAGE = 30;
const WATCHED = 32; // at most; the others are seen at the next look
const NEWS = "scanwire.submitted";

export class List {
  #body = find("list-body");
  #text = find("list-text");
  #more = findButton("list-more");
  /** @type {Map<string, Line>} */
  #lines = new Map();
  /** @type {string | null} */
  #next = null;
  #isOpen = false;
  #isReading = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer = undefined;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #ticking = undefined;
  /** @type {Scanners["scanners"]} */
  #scanners = [];

  constructor() {
    this.#more.addEventListener("click", () => void this.#read(this.#next));
    document.addEventListener("visibilitychange", () => this.#look());
    addEventListener("storage", ({ key }) => key === NEWS && this.#look());
  }

  /** @param {Scanners["scanners"]} scanners */
  explain(scanners) {
    this.#scanners = scanners;
    for (const line of this.#lines.values()) this.#describe(line);
  }

  open() {
    this.#isOpen = true;
    this.#look();
  }

  close() {
    this.#isOpen = false;
    clearTimeout(this.#timer);
    clearTimeout(this.#ticking);
    for (const { end, element } of this.#lines.values()) {
      end();
      element.remove();
    }
    this.#lines.clear();
  }

  /** Other tabs of this browser look at once. @param {string} id */
  static announce(id) {
    try {
      localStorage.setItem(NEWS, id);
    } catch {} // they look by and by
  }

  #look() {
    clearTimeout(this.#timer);
    if (!this.#isOpen || document.hidden) return;
    this.#timer = setTimeout(() => this.#look(), LOOK_EVERY_MS);
    void this.#read(null);
    this.#tick();
  }

  /** @param {string | null} before */
  async #read(before) {
    if (this.#isReading) return;
    this.#isReading = true;
    try {
      const page = await scanwire.list({ limit: PAGE, ...(before === null ? {} : { before }) });
      if (!this.#isOpen) return;
      const isFirst = this.#lines.size === 0 || before !== null;
      for (const snapshot of page.scans) this.#show(snapshot);
      if (isFirst) this.#next = page.next === null ? null : new URLSearchParams(page.next.split("?")[1]).get("before");
      this.#more.hidden = this.#next === null;
      this.#order();
      setText(this.#text, this.#lines.size === 0 ? "None yet. What you start is listed here, on this page and on others of yours." : "");
    } catch (error) {
      if (this.#isOpen) setText(this.#text, error instanceof Error ? error.message : String(error));
    } finally {
      this.#isReading = false;
    }
  }

  /** @param {Snapshot} snapshot */
  #show(snapshot) {
    const known = this.#lines.get(snapshot.id);
    if (known !== undefined) {
      known.standing.read(snapshot, true);
      this.#update(known);
      return;
    }
    const line = this.#makeLine(snapshot);
    this.#lines.set(snapshot.id, line);
    const watched = [...this.#lines.values()].filter(({ standing }) => standing.end === null).length;
    if (snapshot.end === null && watched <= WATCHED) this.#watch(snapshot, line);
    this.#update(line);
  }

  /**
   * @param {Snapshot} snapshot
   * @param {Line} line
   */
  #watch(snapshot, line) {
    const scan = scanwire.watch(snapshot.id, { after: snapshot.cursor });
    const off = scan.on("event", (event) => {
      line.standing.take(event);
      if (!document.hidden) this.#update(line);
    });
    line.end = () => {
      off();
      scan.close();
    };
  }

  /**
   * @param {Snapshot} snapshot
   * @returns {Line}
   */
  #makeLine(snapshot) {
    const standing = new Standing();
    standing.read(snapshot, true);
    const link = make("a", { href: `/scans/${snapshot.id}`, "data-nav": true }, standing.name);
    const params = make("span", { class: "soft params" });
    const state = make("span", { class: "badge" });
    const matches = make("td", { class: "num" });
    const duration = make("td", { class: "num" });
    const again = make("a", { href: `/?again=${snapshot.id}`, "data-nav": true, "aria-label": `Run ${standing.name} again…` }, "again…");
    const name = make("td", {}, link);
    if (isSynthetic(snapshot.data_version)) name.append(make("span", { class: "badge synthetic" }, "synthetic"));
    name.append(params);
    const element = make("tr", {}, name, make("td", {}, state), matches, duration);
    element.append(make("td", {}, makeTime(snapshot.created_ts, moment)), make("td", {}, again));
    const line = { standing, element, state, matches, duration, params, end: () => {} };
    this.#describe(line);
    element.dataset.created = `${snapshot.created_ts}`;
    return line;
  }

  /** @param {Line} line */
  #describe({ standing, params }) {
    const text = describeParams(standing, this.#scanners.find((one) => one.name === standing.scanner)?.params);
    setText(params, text);
    params.title = text;
  }

  /** @param {Line} line */
  #update({ standing, state, matches, duration }) {
    const { share, queued } = standing;
    let text = `${standing.state}`;
    if (standing.state === "running" && share !== null) text = `running, ${formatPercent(share)}`;
    if (standing.state === "queued" && queued !== null) text = `${formatOrdinal(queued.position)} in the queue`;
    setText(state, text);
    state.dataset.state = standing.state;
    setText(matches, formatWhole(standing.matches));
    const elapsed = standing.elapsedS;
    setText(duration, elapsed === null ? "–" : formatDuration(elapsed));
  }

  #order() {
    const lines = [...this.#lines.values()].sort((a, b) => Number(b.element.dataset.created) - Number(a.element.dataset.created));
    lines.forEach(({ element }, index) => {
      if (this.#body.children[index] !== element) this.#body.insertBefore(element, this.#body.children[index] ?? null);
    });
  }

  /** Durations go on without events. */
  #tick() {
    clearTimeout(this.#ticking);
    if (!this.#isOpen || document.hidden) return;
    for (const line of this.#lines.values()) if (line.standing.end === null) this.#update(line);
    this.#ticking = setTimeout(() => this.#tick(), TICK_MS);
  }
}
