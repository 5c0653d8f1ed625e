// @ts-check
/** The page of one scan: its progress, and its matches as they come. */

import { notify, offerNotification, say, sayProgress, showFavicon, showTitle } from "./attention.js";
import { Chart } from "./chart.js";
import { find, findButton, findInput, findLink, make, makeTime, setText } from "./dom.js";
import { clock, countPercent, describeParams, formatCount, formatDuration, formatRange, formatRate, formatWhole, isSynthetic } from "./format.js";
import { Months } from "./months.js";
import { Standing } from "./progress.js";
import { KEEP_ROWS, Rows } from "./rows.js";
import { download, hasKey, scanwire } from "./server.js";
import { Table } from "./table.js";
import { RequestRefused } from "../scanwire.js";

/** @import { Scan, ScanEvent, Scanners } from "../scanwire.d.ts" */

const DRAW_EVERY_MS = 100;
const TICK_MS = 250;
const FILTER_CALM_MS = 150;
const EXPORTS = ["csv", "json", "parquet"];
const CONSTANT = ["setup"]; // the scanner's own name, in each row

export class ScanView {
  #rows = new Rows();
  #table;
  #months;
  #chart;
  #standing = new Standing();
  /** @type {Scan | null} */
  #scan = null;
  #leaving = new AbortController();
  /** @type {Scanners["scanners"]} */
  #scanners = [];
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer = undefined;
  #drawnAt = -Infinity;
  #refused;
  #gone;

  /**
   * @param {(error: Error) => void} refused something was not allowed, or does not work now
   * @param {(error: Error) => void} gone there is no such scan to show
   */
  constructor(refused, gone) {
    this.#refused = refused;
    this.#gone = gone;
    this.#chart = new Chart(() => find("grid").focus());
    this.#table = new Table(find("grid"), this.#rows, (place) => this.#openRow(place), () => this.#draw());
    this.#months = new Months(find("months"), (month) => {
      findInput("filter").value = month;
      this.#filter();
    });
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let filtering;
    findInput("filter").addEventListener("input", () => {
      clearTimeout(filtering);
      filtering = setTimeout(() => this.#filter(), FILTER_CALM_MS);
    });
    findButton("pause").addEventListener("click", () => this.#pause(!this.#rows.isPaused));
    findButton("cancel").addEventListener("click", () => void this.#cancel());
    for (const format of EXPORTS) this.#offerExport(format);
    document.addEventListener("visibilitychange", () => this.#drawSoon());
    offerNotification();
  }

  /** What columns and parameters mean, once that is known. @param {Scanners["scanners"]} scanners */
  explain(scanners) {
    this.#scanners = scanners;
    this.#drawSoon();
  }

  /**
   * @param {string} id
   * @param {Scan} [submitted] just now
   */
  open(id, submitted) {
    this.close();
    this.#leaving = new AbortController();
    const scan = submitted ?? scanwire.watch(id);
    this.#scan = scan;
    this.#standing = new Standing();
    find("scan").hidden = false;
    for (const format of EXPORTS) findLink(`export-${format}`).href = `/v1/scans/${encodeURIComponent(id)}/matches.${format}`;
    findLink("again").href = `/?again=${encodeURIComponent(id)}`;
    findInput("filter").value = "";
    this.#rows.sort = null;
    this.#rows.filterBy("");
    this.#clearRows();
    this.#pause(false);
    if (scan.snapshot !== null) this.#standing.read(scan.snapshot);
    else void this.#look(scan);
    this.#showToken(scan.snapshot?.producer_token);
    const leave = [scan.on("event", (event) => this.#take(event)), scan.on("error", (error) => this.#fail(error))];
    this.#leaving.signal.addEventListener("abort", () => {
      for (const off of leave) off();
      scan.close();
    });
    this.#draw();
  }

  close() {
    this.#leaving.abort();
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#scan = null;
    find("scan").hidden = true;
    showFavicon(null, "");
  }

  /** @param {Scan} scan */
  async #look(scan) {
    const { signal } = this.#leaving;
    try {
      this.#standing.read(await scan.look({ signal }));
      this.#drawSoon();
    } catch (error) {
      // Its events say the same, if they come.
      if (!signal.aborted && error instanceof Error && isMissing(error)) this.#fail(error);
    }
  }

  /** @param {Error} error */
  #fail(error) {
    if (!isMissing(error) || this.#standing.state !== "reading") return this.#refused(error);
    this.close();
    this.#gone(error);
  }

  /** Of a scan whose work is done elsewhere: whoever does it needs this. @param {string | undefined} token */
  #showToken(token) {
    find("token").hidden = token === undefined;
    const events = `${location.origin}/v1/scans/${this.#scan?.id}/events`;
    const post = `curl -H "Authorization: Bearer ${token}" --json '{"type":"progress","done":1}' ${events}`;
    setText(find("token-text"), token === undefined ? "" : post);
  }

  // What comes.

  /** @param {ScanEvent} event */
  #take(event) {
    const standing = this.#standing;
    const before = standing.state;
    if (event.type === "reset") this.#clearRows();
    standing.take(event);
    if (event.type === "matches") {
      this.#rows.add(event.data.rows);
      this.#months.add(event.data.rows);
    } else if (event.type === "started") {
      this.#months.clear(standing.params.start, standing.params.end);
      this.#months.add(this.#rows.all);
    } else if (event.type === "end" && before !== standing.state) {
      // An end that was there before this page was is no news.
      if (Date.now() - event.ts < 60_000) notify(event.scan ?? "", `${standing.name}: ${standing.state}`, standing.describe());
    }
    this.#callOut(before);
    this.#drawSoon();
  }

  /** To those who look elsewhere, in a hidden tab as well. @param {string} before */
  #callOut(before) {
    const standing = this.#standing;
    const share = standing.share;
    showTitle(standing.name, standing.end === null ? share : null);
    showFavicon(standing.end === null ? share : (share ?? 1), standing.state);
    if (before !== standing.state) say(standing.speak());
    else if (standing.state === "running") sayProgress(standing.speak(), share ?? 0);
  }

  #clearRows() {
    this.#rows.clear();
    this.#chart.close();
    this.#months.clear(this.#standing.params.start, this.#standing.params.end);
    this.#table.clear(this.#scanners.find((one) => one.name === this.#standing.scanner)?.columns ?? {}, CONSTANT);
  }

  // Showing it.

  #drawSoon() {
    if (this.#scan === null || document.hidden) return;
    if (this.#timer !== undefined && performance.now() - this.#drawnAt < TICK_MS * 2) return;
    clearTimeout(this.#timer);
    const wait = Math.max(DRAW_EVERY_MS - (performance.now() - this.#drawnAt), 0);
    this.#timer = setTimeout(() => requestAnimationFrame(() => this.#draw()), wait);
  }

  #draw() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (this.#scan === null || document.hidden) return;
    this.#drawnAt = performance.now();
    this.#table.update(() => this.#rows.apply());
    this.#months.draw();
    this.#drawStanding();
    this.#drawCounts();
    // Elapsed time goes on without events.
    if (this.#standing.end === null) this.#timer = setTimeout(() => this.#draw(), TICK_MS);
  }

  #drawStanding() {
    const standing = this.#standing;
    const { state, progress, share, end } = standing;
    const scanner = this.#scanners.find((one) => one.name === standing.scanner);
    setText(find("scan-title"), scanner?.is_external === false ? scanner.title : standing.name);
    const params = standing.scanner === "" ? "" : describeParams(standing, scanner?.params);
    setText(find("scan-params"), params);
    find("scan-params").title = params;
    const badge = find("scan-state");
    setText(badge, state === "cancelling" ? "cancelling…" : state);
    badge.dataset.state = state;
    find("scan-synthetic").hidden = !isSynthetic(standing.dataVersion);
    findButton("cancel").hidden = !["queued", "running", "cancelling"].includes(state);
    findButton("pause").disabled = end !== null && !this.#rows.isPaused;
    find("wish").hidden = end !== null;
    findButton("cancel").disabled = state === "cancelling";
    find("stats").dataset.state = state;
    this.#drawBar(share, state);
    setText(find("stat-done"), standing.done);
    setText(find("stat-matches"), formatWhole(standing.matches));
    const rate = progress?.rate ?? null;
    setText(find("stat-rate"), rate === null ? "–" : `${formatRate(rate)} ${standing.unit}/s`);
    const elapsed = standing.elapsedS;
    setText(find("stat-elapsed"), elapsed === null ? "–" : formatDuration(elapsed));
    this.#drawSince(standing.startedTs);
    const eta = end === null ? progress?.eta_s : null;
    setText(find("stat-left"), eta ? formatRange(eta) : "–");
    setText(find("stat-text-name"), end === null ? "Now" : "Outcome");
    setText(find("stat-text"), standing.describe());
    find("stat-text").title = standing.describe();
    if (end !== null && find("skipped").dataset.of !== this.#scan?.id) this.#drawSkipped(end);
    if (end === null) find("skipped").hidden = true;
    if (end === null) delete find("skipped").dataset.of;
  }

  /** @param {number | null} ts when it started */
  #drawSince(ts) {
    const box = find("stat-since");
    if (box.dataset.ts === `${ts}`) return;
    box.dataset.ts = `${ts}`;
    box.replaceChildren(...(ts === null ? [] : [", from ", makeTime(ts, clock)]));
  }

  /**
   * @param {number | null} share
   * @param {string} state
   */
  #drawBar(share, state) {
    const bar = find("progress");
    bar.dataset.state = share === null && state === "running" ? "unknown" : state;
    if (share === null) bar.removeAttribute("aria-valuenow");
    else bar.setAttribute("aria-valuenow", `${countPercent(share)}`);
    bar.setAttribute("aria-valuetext", this.#standing.speak());
    find("progress-bar").style.transform = `scaleX(${share ?? 0})`;
  }

  #drawCounts() {
    const { order, waiting, received, isPaused, filter } = this.#rows;
    const lost = received > KEEP_ROWS ? `; the table holds the first ${formatWhole(KEEP_ROWS)}, the exports all` : "";
    const held = isPaused && waiting > 0 ? `, ${formatWhole(waiting)} new wait` : "";
    const shown = filter.trim() === "" ? formatCount(order.length, "row") : `${formatWhole(order.length)} of ${formatCount(received, "row")}`;
    setText(find("shown"), `${shown}${held}${lost}`);
    const { end, state } = this.#standing;
    if (order.length > 0) this.#table.say("");
    else if (filter.trim() !== "" && received > 0) this.#table.say("No row fits this filter.");
    else if (end === null) this.#table.say(state === "queued" ? "Matches come here as soon as the scan runs." : "No match yet.");
    else if (end.matches > 0 && received === 0) this.#table.say("The rows of this scan are past their retention. Run it again.");
    else this.#table.say(end.state === "completed" ? "Nothing matched. Run it again with wider thresholds." : "No match was found before it ended.");
  }

  /** @param {import("../scanwire.d.ts").End} end */
  #drawSkipped(end) {
    const box = find("skipped");
    box.dataset.of = this.#scan?.id ?? "";
    box.hidden = end.skipped.length === 0;
    /** @type {Map<string, string[]>} */
    const reasons = new Map();
    for (const { symbol, reason } of end.skipped) {
      for (const part of reason.split("; ")) {
        const [, count = "", why = part] = /^(\d+) rows? (.*)$/.exec(part) ?? [];
        const what = count === "" ? why : `rows ${why}`;
        reasons.set(what, [...(reasons.get(what) ?? []), count === "" ? symbol : `${symbol} (${count})`]);
      }
    }
    setText(find("skipped-title"), `Left out: ${formatCount(end.skipped_symbols, "symbol")}`);
    const terms = [...reasons].flatMap(([why, symbols]) => [make("dt", {}, why), make("dd", {}, symbols.join(", "))]);
    find("skipped-list").replaceChildren(make("dl", {}, ...terms));
  }

  // What the reader does.

  #filter() {
    this.#rows.filterBy(findInput("filter").value);
    find("grid").scrollTop = 0;
    this.#draw();
  }

  /** @param {boolean} isPaused */
  #pause(isPaused) {
    this.#rows.isPaused = isPaused;
    const button = findButton("pause");
    button.setAttribute("aria-pressed", `${isPaused}`);
    this.#drawSoon();
    if (this.#scan !== null) this.#draw();
  }

  /** @param {number} place */
  #openRow(place) {
    const row = this.#rows.all[place];
    if (row === undefined) return;
    void this.#chart.open(row);
    this.#table.reveal(); // the chart may have come up over it
  }

  async #cancel() {
    const scan = this.#scan;
    if (scan === null) return;
    const before = this.#standing.state;
    this.#standing.state = "cancelling"; // at once; the events say how it ends
    this.#draw();
    try {
      this.#standing.read(await scan.cancel({ signal: this.#leaving.signal }));
    } catch (error) {
      if (this.#leaving.signal.aborted) return;
      if (this.#standing.state === "cancelling") this.#standing.state = before;
      this.#refused(error instanceof Error ? error : new Error(String(error)));
    }
    this.#drawSoon();
  }

  /** @param {string} format */
  #offerExport(format) {
    const link = findLink(`export-${format}`);
    link.addEventListener("click", (event) => {
      const name = `${this.#standing.scanner}-${this.#scan?.id.slice(2, 10)}.${format}`;
      link.download = format === "json" ? name : ""; // the others are named by the server
      if (!hasKey()) return;
      event.preventDefault();
      download(link.href, name).catch(this.#refused);
    });
  }
}

/** @param {Error} error */
const isMissing = (error) => error instanceof RequestRefused && error.status === 404;
