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
  #svg = draw("svg", { class: "months-plot", height: HEIGHT + AXIS, role: "img" });
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
  #isDirty = true;

  /**
   * @param {HTMLElement} box
   * @param {(month: string) => void} choose a month was clicked, as 2012-03
   */
  constructor(box, choose) {
    this.#box = box;
    this.#choose = choose;
    this.#svg.append(this.#mark, this.#bars, this.#from, this.#to);
    box.append(this.#svg, this.#text);
    this.#svg.addEventListener("pointermove", (event) => this.#point(event));
    this.#svg.addEventListener("pointerleave", () => this.#point(null));
    this.#svg.addEventListener("click", (event) => {
      const month = this.#findMonth(event);
      if (month !== null && this.#counts.has(month)) this.#choose(writeMonth(month));
    });
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
      this.#svg.setAttribute("aria-label", "No matches with a date yet");
      setText(this.#text, "None yet");
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
    const text = this.#summarise();
    this.#svg.setAttribute("aria-label", text);
    if (!this.#svg.matches(":hover")) setText(this.#text, text);
  }

  #summarise() {
    const [month] = [...this.#counts].find(([, count]) => count === this.#most) ?? [0];
    return `Most in ${nameMonth(month)}: ${formatCount(this.#most, "match", "matches")}`;
  }

  /** @param {PointerEvent | MouseEvent} event */
  #findMonth(event) {
    const { first, months } = this.#span;
    const at = event.clientX - this.#svg.getBoundingClientRect().left;
    const month = first + Math.floor((at / this.#box.clientWidth) * months);
    return this.#counts.size > 0 && month >= first && month < first + months ? month : null;
  }

  /** @param {PointerEvent | null} event */
  #point(event) {
    const month = event === null ? null : this.#findMonth(event);
    if (month === null) {
      this.#mark.setAttribute("width", "0");
      if (this.#counts.size > 0) setText(this.#text, this.#summarise());
      return;
    }
    const { first, months } = this.#span;
    const step = this.#box.clientWidth / months;
    this.#mark.setAttribute("x", `${(month - first) * step}`);
    this.#mark.setAttribute("width", `${Math.max(step, 2)}`);
    setText(this.#text, `${nameMonth(month)}: ${formatCount(this.#counts.get(month) ?? 0, "match", "matches")}`);
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
