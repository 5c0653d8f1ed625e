// @ts-check
/** The page: which part of it an address shows, and what happens when the server says no. */

import { showFavicon, showTitle } from "./page/attention.js";
import { showConnection } from "./page/connection.js";
import { find, findButton, findInput, findSelect, make, setText } from "./page/dom.js";
import { Form, sayError } from "./page/form.js";
import { formatDuration } from "./page/format.js";
import { List } from "./page/list.js";
import { ScanView } from "./page/scan.js";
import { isWorthWaiting, keepAsking, scanwire, useKey } from "./page/server.js";
import { RequestRefused } from "./scanwire.js";

/** @import { Scan, Scanners } from "./scanwire.d.ts" */

const SCAN = /^\/scans\/([^/]+)$/;

const form = new Form(find("fields"));
const list = new List();
const view = new ScanView(complain, showGone);
/** @type {Scanners | null} */
let known = null;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let counting;
/** What the form was filled for: going back to it finds it as it was left. @type {string | null} */
let filledFor = null;

// Addresses.

/** @param {Scan} [submitted] the scan that this address names */
function show(submitted) {
  const id = SCAN.exec(location.pathname)?.[1];
  quiet();
  find("gone").hidden = true;
  const isHome = id === undefined;
  find("home").hidden = !isHome;
  document.body.classList.toggle("of-scan", !isHome);
  for (const [link, isHere] of [["to-new", isHome && location.hash !== "#scans"], ["to-scans", isHome && location.hash === "#scans"]]) {
    if (isHere) find(`${link}`).setAttribute("aria-current", "page");
    else find(`${link}`).removeAttribute("aria-current");
  }
  if (isHome) {
    view.close();
    showTitle("New scan", null);
    list.open();
    void fillForm();
  } else {
    list.close();
    showTitle("Scan", null);
    view.open(id, submitted);
  }
}

/**
 * @param {string} address
 * @param {Scan} [submitted]
 */
function go(address, submitted) {
  if (submitted === undefined && new URL(address, location.href).hash !== "#scans") filledFor = null;
  if (new URL(address, location.href).href !== location.href) history.pushState(null, "", address);
  show(submitted);
  const hash = location.hash === "#scans" ? "scans" : SCAN.test(location.pathname) ? "scan-title" : "home-title";
  find(hash).focus();
  find(hash).scrollIntoView({ block: "nearest" });
  if (hash !== "scans") scrollTo(0, 0);
}

document.addEventListener("click", (event) => {
  const link = event.target instanceof Element ? event.target.closest("a[data-nav]") : null;
  if (!(link instanceof HTMLAnchorElement) || event.button !== 0) return;
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  go(link.href);
});
addEventListener("popstate", () => show());

// The form.

async function fillForm() {
  const isFilled = filledFor === location.search || (filledFor !== null && location.hash === "#scans");
  if (known === null || isFilled) return;
  filledFor = location.search;
  const query = new URLSearchParams(filledFor);
  const again = query.get("again");
  let scanner = query.get("scanner") ?? findSelect("scanner").value;
  /** @type {Record<string, unknown>} */
  let params = {};
  if (again !== null) {
    try {
      const scan = scanwire.watch(again);
      ({ scanner, params } = await scan.look());
    } catch (error) {
      complain(error instanceof Error ? error : new Error(String(error)));
    }
  }
  if (!known.scanners.some(({ name }) => name === scanner)) scanner = known.scanners[0]?.name ?? "";
  findSelect("scanner").value = scanner;
  chooseScanner();
  form.fill(params);
  if (location.hash === "#scans") find("scans").scrollIntoView(); // the form has grown above it
}

function findScanner() {
  return known?.scanners.find(({ name }) => name === findSelect("scanner").value);
}

function chooseScanner() {
  const scanner = findScanner();
  if (scanner === undefined || known === null) return;
  setText(find("scanner-summary"), scanner.summary);
  sayError("");
  const presets = Object.keys(scanner.presets);
  find("preset-field").hidden = presets.length === 0;
  const options = ["", ...presets].map((name) => make("option", { value: name }, name === "" ? "defaults" : name));
  findSelect("preset").replaceChildren(...options);
  form.show(scanner.params, /** @type {any} */ (known.features));
}

findSelect("scanner").addEventListener("change", () => {
  history.replaceState(null, "", `/?scanner=${encodeURIComponent(findSelect("scanner").value)}`);
  filledFor = location.search;
  chooseScanner();
});
findSelect("preset").addEventListener("change", () => form.fill(findScanner()?.presets[findSelect("preset").value] ?? {}));

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  void submit();
});

async function submit() {
  const params = form.read();
  if (params === null) return;
  const button = findButton("start");
  button.disabled = true;
  setText(button, "Starting…");
  clearTimeout(counting);
  sayError("");
  try {
    const scan = await scanwire.submit(findSelect("scanner").value, params);
    List.announce(scan.id);
    go(`/scans/${scan.id}`, scan);
  } catch (error) {
    refuse(error instanceof Error ? error : new Error(String(error)));
  } finally {
    button.disabled = false;
    setText(button, "Start scan");
  }
}

/** @param {Error} error why the scan was not taken */
function refuse(error) {
  if (!(error instanceof RequestRefused)) return sayError(error.message);
  if (error.status === 401) return askForKey(error.message);
  if (error.problem.errors) {
    const rest = form.showErrors(error.problem.errors);
    if (rest.length > 0) sayError(rest.map(({ field, message }) => `${field}: ${message}`).join("; "));
    return;
  }
  sayError(withoutWait(error));
  if (error.retryAfterMs !== null) countDown(Date.now() + error.retryAfterMs, "form-when", "Try again", "You can try again now.");
}

/** What the server said but for the seconds, which are counted down beside it. @param {Error} error */
const withoutWait = (error) => error.message.replace(/ ?Try again in [\d.]+ s\.?/, "");

/**
 * Beside what is read aloud once, not in it: else each second would be read out.
 * @param {number} untilMs
 * @param {string} id of the element that says how long it is
 * @param {string} what can be done, or comes, then
 * @param {string} now said once the time has come
 */
function countDown(untilMs, id, what, now) {
  clearTimeout(counting);
  const rest = Math.ceil((untilMs - Date.now()) / 1000);
  setText(find(id), rest > 0 ? `${what} in ${formatDuration(rest)}.` : now);
  if (rest > 0) counting = setTimeout(() => countDown(untilMs, id, what, now), 500);
}

// Refusals.

/** @param {Error} error */
function complain(error) {
  if (error instanceof RequestRefused && error.status === 401) return askForKey(error.message);
  sayTrouble(withoutWait(error));
  if (!(error instanceof RequestRefused) || !isWorthWaiting(error) || error.retryAfterMs === null) return;
  countDown(Date.now() + error.retryAfterMs, "trouble-when", "It may work", "It may work now.");
}

/** @param {string} message above the page */
function sayTrouble(message) {
  clearTimeout(counting);
  find("trouble").hidden = false;
  setText(find("trouble-text"), message);
  setText(find("trouble-when"), "");
}

function quiet() {
  clearTimeout(counting);
  find("trouble").hidden = true;
  sayError("");
}

/** @param {Error} error */
function showGone(error) {
  showTitle("No such scan", null);
  setText(find("gone-text"), error.message);
  find("gone").hidden = false;
}

/** @param {string} text */
function askForKey(text) {
  find("home").hidden = true;
  view.close();
  list.close();
  setText(find("key-text"), text);
  find("key").hidden = false;
  findInput("key-input").focus();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(findInput("key-input").value.trim());
});

// Start.

async function start() {
  showFavicon(null, "");
  showConnection(scanwire);
  show();
  let hasWaited = false;
  try {
    known = await keepAsking(() => scanwire.scanners(), (error, untilMs) => {
      hasWaited = true;
      sayTrouble(withoutWait(error));
      countDown(untilMs, "trouble-when", "Next attempt", "Trying now.");
    });
  } catch (error) {
    return complain(error instanceof Error ? error : new Error(String(error)));
  }
  if (hasWaited) quiet();
  findSelect("scanner").replaceChildren(...known.scanners.map(({ name, title }) => make("option", { value: name }, `${title} (${name})`)));
  findButton("start").disabled = false;
  list.explain(known.scanners);
  view.explain(known.scanners);
  if (!find("home").hidden) void fillForm();
}

void start();
