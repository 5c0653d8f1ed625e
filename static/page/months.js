// @ts-check
/** How many matches there are in each month: a small chart that fills in as they come. */

import { draw, make, setText } from "./dom.js";
import { formatCount } from "./format.js";

/** @import { Row } from "../scanwire.d.ts" */

const HEIGHT = 72;
const AXIS = 16;
const DAY = /^\d{4}-\d{2}-\d{2}/;
const monthName = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", timeZone: "UTC" });

export class Months {
  #box;
  #choose;
  #svg = draw("svg", { height: HEIGHT + AXIS, "aria-hidden": "true" });
  #plot = make("div", {
    class: "months-plot",
    tabindex: 0,
    role: "slider",
    "aria-label": "Matches per month; the arrow keys go from month to month, Enter shows the rows of one",
    "aria-valuemin": 1,
  });
  #bars = draw("path", { class: "bars" });
  #mark = draw("rect", { class: "mark", y: 0, height: HEIGHT, width: 0 });
  #from = draw("text", { y: HEIGHT + 13 });
  #to = draw("text", { y: HEIGHT + 13, "text-anchor": "end" });
  #text = make("p", { class: "soft readout" });
  /** @type {Map<number, number>} counts by month, which is counted from the year 0 */
  #counts = new Map();
  #first = Infinity;
  #last = -Infinity;
  /** @type {[number, number]} what was asked for, where that is known */
  #asked = [Infinity, -Infinity];
  #most = 0;
  /** @type {number | null} the month that is pointed at */
  #at = null;
  #isDirty = true;

  /**
   * @param {HTMLElement} box
   * @param {(month: string) => void} choose a month was chosen, as 2012-03
   */
  constructor(box, choose) {
    this.#box = box;
    this.#choose = choose;
    this.#svg.append(this.#mark, this.#bars, this.#from, this.#to);
    this.#plot.append(this.#svg);
    box.append(this.#plot, this.#text);
    this.#plot.addEventListener("pointermove", (event) => this.#point(this.#findMonth(event)));
    this.#plot.addEventListener("click", (event) => this.#take(this.#findMonth(event)));
    this.#plot.addEventListener("keydown", (event) => this.#press(event));
    for (const left of ["pointerleave", "blur"]) this.#plot.addEventListener(left, () => this.#point(null));
    new ResizeObserver(() => {
      this.#isDirty = true;
      this.draw();
    }).observe(box);
  }

  /**
   * @param {unknown} start as 2012-01-01, or null
   * @param {unknown} end
   */
  clear(start = null, end = null) {
    this.#counts.clear();
    this.#first = Infinity;
    this.#last = -Infinity;
    this.#asked = [readMonth(start) ?? Infinity, readMonth(end) ?? -Infinity];
    this.#most = 0;
    this.#at = null;
    this.#isDirty = true;
    this.draw();
  }

  /** @param {readonly Row[]} rows */
  add(rows) {
    for (const { date } of rows) {
      const month = readMonth(date);
      if (month === null) continue;
      const count = (this.#counts.get(month) ?? 0) + 1;
      this.#counts.set(month, count);
      this.#most = Math.max(this.#most, count);
      this.#first = Math.min(this.#first, month);
      this.#last = Math.max(this.#last, month);
      this.#isDirty = true;
    }
  }

  get #span() {
    const first = Math.min(this.#first, this.#asked[0]);
    const last = Math.max(this.#last, this.#asked[1]);
    return { first, months: last - first + 1 };
  }

  draw() {
    if (!this.#isDirty) return;
    this.#isDirty = false;
    const width = this.#box.clientWidth;
    const { first, months } = this.#span;
    const isEmpty = this.#counts.size === 0 || width === 0;
    setText(this.#from, isEmpty ? "" : nameMonth(first));
    setText(this.#to, isEmpty || months === 1 ? "" : nameMonth(first + months - 1));
    this.#to.setAttribute("x", `${width}`);
    this.#svg.setAttribute("width", `${width}`);
    if (isEmpty) {
      this.#bars.setAttribute("d", "");
      this.#point(null);
      return;
    }
    const step = width / months;
    const bar = Math.max(Math.min(step * 0.8, 24), 1);
    let path = "";
    for (const [month, count] of this.#counts) {
      const height = (count / this.#most) * (HEIGHT - 2) + 1;
      path += `M${((month - first + 0.5) * step - bar / 2).toFixed(1)} ${HEIGHT}v${(-height).toFixed(1)}h${bar.toFixed(1)}v${height.toFixed(1)}z`;
    }
    this.#bars.setAttribute("d", path);
    this.#point(this.#at);
  }

  #summarise() {
    if (this.#counts.size === 0) return "None";
    const [month] = [...this.#counts].find(([, count]) => count === this.#most) ?? [0];
    return `Most in ${nameMonth(month)}: ${formatCount(this.#most, "match", "matches")}`;
  }

  /** @param {MouseEvent} event */
  #findMonth(event) {
    const { first, months } = this.#span;
    const at = event.clientX - this.#plot.getBoundingClientRect().left;
    const month = first + Math.floor((at / this.#box.clientWidth) * months);
    return this.#counts.size > 0 && month >= first && month < first + months ? month : null;
  }

  /** @param {number | null} month */
  #take(month) {
    if (month !== null && this.#counts.has(month)) this.#choose(writeMonth(month));
  }

  /** @param {KeyboardEvent} event */
  #press(event) {
    if (this.#counts.size === 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const { first, months } = this.#span;
    const last = first + months - 1;
    /** @type {Record<string, number>} */
    const moves = { ArrowLeft: (this.#at ?? last + 1) - 1, ArrowRight: (this.#at ?? first - 1) + 1, Home: first, End: last };
    const move = moves[event.key];
    if (move !== undefined) this.#point(Math.min(Math.max(move, first), last));
    else if (event.key === "Enter" || event.key === " ") this.#take(this.#at);
    else return;
    event.preventDefault();
  }

  /** Says how many matches a month has; without one, which has most. @param {number | null} month */
  #point(month) {
    this.#at = month;
    const isNone = month === null;
    const { first, months } = this.#span;
    const step = this.#box.clientWidth / months;
    const text = isNone ? this.#summarise() : `${nameMonth(month)}: ${formatCount(this.#counts.get(month) ?? 0, "match", "matches")}`;
    setText(this.#text, text);
    this.#mark.setAttribute("x", isNone ? "0" : `${(month - first) * step}`);
    this.#mark.setAttribute("width", isNone ? "0" : `${Math.max(step, 2)}`);
    this.#plot.setAttribute("aria-valuemax", `${Math.max(months, 1)}`);
    this.#plot.setAttribute("aria-valuenow", `${isNone ? 1 : month - first + 1}`);
    this.#plot.setAttribute("aria-valuetext", text);
  }
}

/** @param {unknown} day */
function readMonth(day) {
  if (typeof day !== "string" || !DAY.test(day)) return null;
  return Number(day.slice(0, 4)) * 12 + Number(day.slice(5, 7)) - 1;
}

/** @param {number} month */
const writeMonth = (month) => `${Math.floor(month / 12)}-${String((month % 12) + 1).padStart(2, "0")}`;

/** @param {number} month */
const nameMonth = (month) => monthName.format(new Date(`${writeMonth(month)}-01T00:00:00Z`));
