// @ts-check
/** Candlesticks with volume of the days around a match, the day marked. */

import { draw, make, setText } from "./dom.js";
import { formatPrice, formatShort } from "./format.js";

/** @typedef {{ date: string[], open: number[], high: number[], low: number[], close: number[], volume: number[] }} Columns */

const MIN_HEIGHT = 170; // of the prices
const MAX_HEIGHT = 480;
const VOLUME_HEIGHT = 46;
const GAP = 10;
const AXIS_HEIGHT = 18;
const AXIS_WIDTH = 66;
const TICKS = 4;
const dayName = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeZone: "UTC" });
const monthName = new Intl.DateTimeFormat(undefined, { month: "short", timeZone: "UTC" });

/**
 * Draws into the box, and again whenever its width changes.
 * @param {HTMLElement} box
 * @param {string} symbol
 * @param {Columns} prices
 * @param {string} day that is marked
 * @returns {() => void} ends it
 */
export function showCandles(box, symbol, prices, day) {
  const marked = prices.date.indexOf(day);
  const readout = make("p", { class: "readout" });
  const plot = make("div", {
    class: "plot",
    tabindex: 0,
    role: "slider",
    "aria-label": `Days of ${symbol}; the arrow keys go from day to day`,
    "aria-valuemin": 1,
    "aria-valuemax": prices.date.length,
  });
  let at = marked >= 0 ? marked : prices.date.length - 1;
  let width = 0;
  let cross = draw("line");

  /** @param {number} index */
  const point = (index) => {
    at = Math.min(Math.max(index, 0), prices.date.length - 1);
    const text = describeDay(prices, at, marked);
    setText(readout, text);
    plot.setAttribute("aria-valuenow", `${at + 1}`);
    plot.setAttribute("aria-valuetext", text);
    const x = `${(at + 0.5) * ((width - AXIS_WIDTH) / prices.date.length)}`;
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
  };
  const redraw = () => {
    if (box.clientWidth === width || box.clientWidth === 0) return;
    width = box.clientWidth;
    cross = draw("line", { class: "cross", y1: 0, y2: chooseHeight(width) + GAP + VOLUME_HEIGHT });
    plot.replaceChildren(makePlot(prices, marked, width, cross));
    point(at);
  };
  plot.addEventListener("keydown", (event) => {
    /** @type {Record<string, number>} */
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: prices.date.length - 1 };
    const move = moves[event.key];
    if (move === undefined) return;
    point(move);
    event.preventDefault();
  });
  plot.addEventListener("pointermove", (event) => {
    const x = event.clientX - plot.getBoundingClientRect().left;
    point(Math.floor((x / (width - AXIS_WIDTH)) * prices.date.length));
  });
  plot.addEventListener("pointerleave", () => point(marked >= 0 ? marked : prices.date.length - 1));
  box.replaceChildren(readout, plot);
  const observer = new ResizeObserver(redraw);
  observer.observe(box);
  redraw();
  return () => observer.disconnect();
}

/**
 * @param {Columns} prices
 * @param {number} index
 * @param {number} marked
 */
function describeDay(prices, index, marked) {
  const [open, high, low, close] = [prices.open, prices.high, prices.low, prices.close].map((one) => formatPrice(one[index] ?? NaN));
  const day = dayName.format(new Date(`${prices.date[index]}T00:00:00Z`));
  const what = index === marked ? ", the match" : "";
  return `${day}${what} · open ${open} · high ${high} · low ${low} · close ${close} · volume ${formatShort(prices.volume[index] ?? NaN)}`;
}

/**
 * @param {Columns} prices
 * @param {number} marked
 * @param {number} width
 * @param {SVGLineElement} cross
 */
function makePlot(prices, marked, width, cross) {
  const count = prices.date.length;
  const step = (width - AXIS_WIDTH) / count;
  const half = Math.max(step * 0.32, 0.5);
  const top = Math.max(...prices.high);
  const bottom = Math.min(...prices.low);
  const room = (top - bottom || top || 1) * 0.04;
  const tall = chooseHeight(width);
  const scale = tall / (top - bottom + 2 * room);
  const y = (/** @type {number} */ price) => (top + room - price) * scale;
  const most = Math.max(...prices.volume, 1);
  const floor = tall + GAP + VOLUME_HEIGHT;

  const svg = draw("svg", { width, height: floor + AXIS_HEIGHT, "aria-hidden": "true" });
  if (marked >= 0) svg.append(draw("rect", { class: "mark", x: marked * step, y: 0, width: step, height: floor }));
  for (const price of chooseTicks(bottom, top)) {
    svg.append(draw("line", { class: "rule", x1: 0, x2: width - AXIS_WIDTH, y1: y(price), y2: y(price) }));
    svg.append(draw("text", { x: width - AXIS_WIDTH + 6, y: y(price) + 4 }, formatPrice(price)));
  }
  svg.append(draw("text", { x: width - AXIS_WIDTH + 6, y: tall + GAP + 10 }, formatShort(most)));
  for (const [index, name] of findMonths(prices.date)) {
    svg.append(draw("text", { x: Math.min(index * step, width - AXIS_WIDTH - 24), y: floor + AXIS_HEIGHT - 4 }, name));
  }
  // Days that rose are hollow, days that fell are filled: the colour is not all that tells them apart.
  const paths = { up: "", down: "", "up-volume": "", "down-volume": "" };
  for (let index = 0; index < count; index += 1) {
    const [open = 0, high = 0, low = 0, close = 0] = [prices.open, prices.high, prices.low, prices.close].map((one) => one[index]);
    const x = (index + 0.5) * step;
    const kind = close >= open ? "up" : "down";
    const [upper, lower] = [y(Math.max(open, close)), y(Math.min(open, close))];
    const height = Math.max(lower - upper, 1);
    paths[kind] +=
      `M${f(x)} ${f(y(high))}V${f(upper)}M${f(x)} ${f(upper + height)}V${f(Math.max(y(low), upper + height))}` +
      `M${f(x - half)} ${f(upper)}h${f(half * 2)}v${f(height)}h${f(-half * 2)}z`;
    const size = ((prices.volume[index] ?? 0) / most) * VOLUME_HEIGHT;
    paths[`${kind}-volume`] += `M${f(x - half)} ${floor}v${f(-size)}h${f(half * 2)}v${f(size)}z`;
  }
  for (const [kind, path] of Object.entries(paths)) svg.append(draw("path", { class: kind, d: path }));
  svg.append(cross);
  return svg;
}

/** @param {number} width */
const chooseHeight = (width) => Math.min(Math.max(width * 0.5, MIN_HEIGHT), MAX_HEIGHT);

const f = (/** @type {number} */ value) => value.toFixed(1);

/**
 * @param {number} low
 * @param {number} high
 */
function chooseTicks(low, high) {
  const rough = (high - low) / TICKS || high / TICKS || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * size).find((one) => one >= rough) ?? rough;
  const ticks = [];
  for (let price = Math.ceil(low / step) * step; price <= high; price += step) ticks.push(price);
  return ticks;
}

/**
 * Where months begin.
 * @param {string[]} days
 * @returns {[number, string][]}
 */
function findMonths(days) {
  /** @type {[number, string][]} */
  const found = [];
  days.forEach((day, index) => {
    const month = day.slice(0, 7);
    if (index === 0 || days[index - 1]?.startsWith(month)) return;
    const isJanuary = month.endsWith("-01");
    found.push([index, isJanuary ? month.slice(0, 4) : monthName.format(new Date(`${month}-01T00:00:00Z`))]);
  });
  return found;
}
