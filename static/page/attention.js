// @ts-check
/** What reaches people who look elsewhere: title, favicon, the line for screen readers, a notification. */

import { find, findInput, findLink, setText } from "./dom.js";
import { formatPercent } from "./format.js";

const SAY_EVERY_MS = 10_000;
const STEPS = 20; // of the favicon
const WISH = "scanwire.notify";
/** @type {Record<string, string>} */
const COLOURS = { completed: "#2f9e62", failed: "#d64545", lost: "#d64545", cancelled: "#8a8f98" };

/**
 * @param {string} name
 * @param {number | null} share of the work that is done; null when there is nothing to say
 */
export function showTitle(name, share) {
  const title = share === null ? `${name} · Scanwire` : `(${formatPercent(share)}) ${name}`;
  if (document.title !== title) document.title = title;
}

let shown = "";

/**
 * A ring that closes.
 * @param {number | null} share
 * @param {string} state of the scan
 */
export function showFavicon(share, state) {
  const step = share === null ? null : Math.floor(share * STEPS) / STEPS;
  const key = `${step} ${state}`;
  if (key === shown) return;
  shown = key;
  findLink("favicon").href = step === null ? "/static/icon.svg" : drawRing(step, COLOURS[state] ?? "#3b82d6");
}

/**
 * @param {number} share
 * @param {string} colour
 */
function drawRing(share, colour) {
  const around = 2 * Math.PI * 12;
  const ring = `cx="16" cy="16" r="12" fill="none" stroke-width="7"`;
  const done = `stroke="${colour}" stroke-dasharray="${share * around} ${around}" transform="rotate(-90 16 16)"`;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle ${ring} stroke="#8a8f9866"/><circle ${ring} ${done}/></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

let saidAt = -Infinity;
let saidTenth = 0;

/**
 * Speaks at every tenth of the way or after 10 s, whichever comes first.
 * @param {string} text
 * @param {number} share
 */
export function sayProgress(text, share) {
  const tenth = Math.floor(share * 10);
  if (tenth === saidTenth && performance.now() - saidAt < SAY_EVERY_MS) return;
  saidTenth = tenth;
  say(text);
}

/** @param {string} text */
export function say(text) {
  saidAt = performance.now();
  setText(find("live"), text);
}

// Notifications.

/** The reader wants one at the end; asked for by the reader alone, and remembered. */
export function offerNotification() {
  const box = findInput("notify");
  const hasThem = "Notification" in globalThis;
  box.disabled = !hasThem;
  box.checked = hasThem && Notification.permission === "granted" && readWish();
  explain(hasThem ? "" : "This browser has no notifications for this page.");
  box.addEventListener("change", async () => {
    const isAllowed = box.checked && (await Notification.requestPermission()) === "granted";
    explain(box.checked && !isAllowed ? "The browser does not allow notifications of this page." : "");
    box.checked = isAllowed;
    try {
      localStorage.setItem(WISH, isAllowed ? "yes" : "no");
    } catch {} // then it holds for this page alone
  });
}

function readWish() {
  try {
    return localStorage.getItem(WISH) === "yes";
  } catch {
    return false;
  }
}

/** @param {string} text */
const explain = (text) => setText(find("notify-text"), text);

/**
 * @param {string} id of the scan: other tabs with it take the same place
 * @param {string} title
 * @param {string} body
 */
export function notify(id, title, body) {
  if (!findInput("notify").checked || !document.hidden) return;
  const note = new Notification(title, { body, tag: id });
  note.onclick = () => {
    window.focus();
    note.close();
  };
}
