// @ts-check
/** Where a scan stands, in numbers and in one sentence, from its events alone. */

import { formatCount, formatDuration, formatOrdinal, formatPercent, formatRange, formatWhole, nameScan } from "./format.js";

/** @import { End, Progress, ScanEvent, Snapshot } from "../scanwire.d.ts" */

/** What is known of one scan. */
export class Standing {
  /** @type {Snapshot["state"] | "reading"} */
  state = "reading";
  scanner = "";
  name = "Scan";
  /** @type {Record<string, unknown>} */
  params = {};
  dataVersion = "";
  /** @type {number | null} */
  total = null;
  unit = "steps";
  /** @type {Progress | null} */
  progress = null;
  /** @type {{ position: number, eta_s: [number, number] | null } | null} */
  queued = null;
  /** @type {number | null} on the server's clock */
  startedTs = null;
  /** @type {End | null} */
  end = null;
  matches = 0;
  attempt = 1;
  isJoined = false;
  #behindMs = Infinity; // how far the server's clock is behind ours, at most; not known before an event has come

  /**
   * @param {Snapshot} snapshot
   * @param {boolean} [isBehind] its rows are counted in it, and do not come as events any more
   */
  read(snapshot, isBehind = false) {
    this.#name(snapshot);
    this.isJoined ||= snapshot.joined;
    if (this.end !== null) return;
    this.state = snapshot.state;
    this.dataVersion = snapshot.data_version;
    this.startedTs ??= snapshot.started_ts;
    this.#readQueued(snapshot);
    this.#readProgress(snapshot.progress);
    if (isBehind) this.matches = Math.max(this.matches, snapshot.matches);
    if (snapshot.end !== null) this.#finish(snapshot.end);
  }

  /** @param {ScanEvent} event */
  take({ type, data, ts }) {
    this.#behindMs = Math.min(this.#behindMs, Date.now() - ts);
    if (type === "reset") {
      this.matches = 0;
      this.progress = this.end = null;
      if (data.snapshot !== null) this.read(data.snapshot);
    } else if (type === "started") {
      this.#name(data);
      this.dataVersion = data.data_version;
      this.total = data.total;
      this.unit = data.unit;
      this.attempt = data.attempt;
      this.startedTs = ts; // of the attempt that is watched
    }
    // What came before the end changes nothing any more, once the end is known.
    if (this.end !== null) return;
    if (type === "queued") {
      this.state = "queued";
      this.queued = data;
    } else if (type === "started") {
      if (this.state !== "cancelling") this.state = "running";
    } else if (type === "progress") {
      this.#readProgress(data);
    } else if (type === "matches") {
      this.matches += data.rows.length;
    } else if (type === "cancelling") {
      this.state = "cancelling";
    } else if (type === "end") {
      this.#finish(data);
    }
  }

  /** @param {End} end */
  #finish(end) {
    this.end = end;
    this.state = end.state;
    this.matches = end.matches;
  }

  /** @param {Snapshot & { eta_s?: [number, number] | null }} snapshot */
  #readQueued({ position, eta_s = null }) {
    this.queued = position === null ? null : { position, eta_s };
  }

  /** @param {Progress | null} progress */
  #readProgress(progress) {
    if (progress === null) return;
    this.progress = progress;
    this.total = progress.total;
    this.unit = progress.unit ?? this.unit;
  }

  /** @param {Pick<Snapshot, "scanner" | "params">} said */
  #name({ scanner, params }) {
    this.scanner = scanner;
    this.params = params;
    this.name = nameScan({ scanner, params });
  }

  /** 0 to 1; null when nobody can know. */
  get share() {
    if (this.state === "completed") return 1;
    if (this.progress === null || !this.total) return this.state === "queued" ? 0 : null;
    return Math.min(this.progress.done / this.total, 1);
  }

  get elapsedS() {
    if (this.end !== null) return this.end.elapsed_s;
    if (this.startedTs === null) return null;
    const behindMs = this.#behindMs === Infinity ? 0 : this.#behindMs;
    return Math.max((Date.now() - behindMs - this.startedTs) / 1000, 0);
  }

  /** One sentence on where it stands. */
  describe() {
    const { end, progress } = this;
    if (end !== null) return this.#describeEnd(end);
    if (this.state === "cancelling") return "Cancelling…";
    if (this.state === "queued" && this.queued !== null) {
      const { position, eta_s } = this.queued;
      return `${formatOrdinal(position)} in the queue${eta_s === null ? "" : `, ${formatRange(eta_s)}`}`;
    }
    if (this.state === "queued") return "In the queue";
    if (this.state === "reading") return "Reading…";
    const phase = progress?.phase ? `: ${progress.phase}` : "";
    return this.attempt > 1 ? `Running, attempt ${this.attempt}${phase}` : `Running${phase}`;
  }

  /** @param {End} end */
  #describeEnd(end) {
    const found = formatCount(end.matches, "match", "matches");
    const kept = end.truncated ? "; there were more than are kept" : "";
    const took = formatDuration(end.elapsed_s);
    if (end.state === "completed") return `${found} in ${took}${kept}${this.isJoined ? ", from an equal scan" : ""}`;
    if (end.state === "cancelled") return `Cancelled after ${took}; ${found} kept${kept}`;
    const why = end.error?.detail ?? end.error?.title ?? "";
    return `${end.state === "lost" ? "Lost" : "Failed"} after ${took}. ${why}`;
  }

  /** For those who hear it. */
  speak() {
    const share = this.share;
    if (share === null || this.end !== null) return `${this.name}: ${this.describe()}`;
    const left = this.progress?.eta_s ? `, ${formatRange(this.progress.eta_s)} left` : "";
    return `${this.name}: ${formatPercent(share)}, ${formatCount(this.matches, "match", "matches")}${left}`;
  }

  get done() {
    const { progress, total, share } = this;
    if (progress === null && total === null) return "–";
    const done = formatWhole(this.state === "completed" ? (total ?? progress?.done ?? 0) : (progress?.done ?? 0));
    if (total === null) return `${done} ${this.unit}`;
    return `${done} of ${formatWhole(total)} ${this.unit}${share === null ? "" : `, ${formatPercent(share)}`}`;
  }
}
