/* The operator's page: what the store looks like now, and a form to ask for deletions.

   How it works. `poll` asks GET /state again and again with the ETag of the last answer; a new answer goes to
   `show`, which patches the page in place, so that neither focus nor the place of reading is lost. Two answers
   are compared by `news`, and what changed is announced once, politely.

   What always holds:
   - Text from the server or from a person becomes a text node; nothing is ever parsed as HTML.
   - The ids of a deletion are in the form, in the confirmation and in the body of one POST; in no address, no
     storage and no log.
   - The token is in this tab's sessionStorage and in the Authorization header, nowhere else.
   - An answer that comes after signing out (or after another sign-in) is dropped. */

const TOKEN_KEY = "sisa.token";
const BUSY_MS = 1000; // between two questions while a request is open
const IDLE_MS = 5000; // and otherwise
const BACKOFF_MS = [1000, 2000, 4000, 8000, 15000, 30000];
const PATIENCE_MS = 15000; // after which an answer counts as lost
const ACCEPT_PATIENCE_MS = 120000; // accepting a deletion reads the rows of its people
const SHARDS_PER_PAGE = 50;
const REQUESTS_AT_FIRST = 5;
const VERSIONS_AT_FIRST = 6;
const HUSH_MS = 100; // a live region must be empty for a moment before the same words are spoken again

const STEPS = [
  ["accepted", "Accepted"],
  ["rows_erased", "Rows erased"],
  ["stages_purged", "Stages purged"],
  ["repairing", "Repairing"],
  ["repaired", "Repaired"],
];
const STEP_NAMES = Object.fromEntries(STEPS);
const STAGES = [
  ["serving", "Serving", "Answers in the live version."],
  ["trained", "Trained", "Clean, an earlier stage of its shard’s chain."],
  ["quarantined", "Quarantined", "Taken out of service by an open deletion, not retrained yet."],
  ["retraining", "Retraining", "Out of service, and its repair runs now."],
  ["empty", "Empty", "Has seen no record."],
];
const STAGE_NAMES = Object.fromEntries(STAGES);
const REGIMES = { gdpr: "GDPR", ccpa: "CCPA" };
const CAUSES = {
  train: "Training", add: "Addition", quarantine: "Quarantine", repair: "Repair", upgrade: "Upgrade", fit: "Aggregation fitted",
};

/** What is emptied at signing out: all that came from the server. */
const SERVED = [
  "store", "summary", "tile-state", "tile-version", "tile-open", "tile-oldest", "legend", "map-caption", "map-head", "map-body",
  "request-list", "chart", "chart-legend", "versions-body", "replica-list", "live", "delete-done-title", "delete-done-text",
  "detail-title", "detail-steps", "detail-facts", "detail-timeline", "detail-evidence", "purged-body", "retrained-body",
];

const $ = (id) => document.getElementById(id);

/** All that the page knows. */
const known = {
  token: "",
  session: 0, // counts sign-ins and sign-outs, to tell old answers
  etag: "",
  state: null,
  skew_ms: 0, // the server's clock less ours
  failures: 0,
  polling: false,
  again: false, // a poll was asked for while one was running
  timer: 0,
  retryAt_ms: 0,
  freshAt_ms: 0,
};
const view = { page: 0, first: false, openOnly: false, requests: REQUESTS_AT_FIRST, versions: VERSIONS_AT_FIRST };
const detail = { request: "", asked: 0 };
const draft = { body: null, fingerprint: "", key: "", sending: false };

/* --- Elements ------------------------------------------------------------------------------------------- */

/** A new element; `attributes` that are null or false are left out. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children);
  return node;
}

/** The same for SVG. */
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** Set a text only if it differs: what did not change is left alone, for whoever reads or selects it. */
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setClass(node, name) {
  if (node.getAttribute("class") !== name) node.setAttribute("class", name);
}

/** Make the children of `parent` those of `items`, in order, keeping each item's element by its key. */
function patch(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let node = old.get(key);
    old.delete(key);
    if (!node) {
      node = make(item);
      node.dataset.key = key;
    }
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
    update(node, item);
  }
  for (const node of old.values()) node.remove();
}

/** Fill a <dl> with pairs of a term and a text, a <time> or null (left out). */
function fillFacts(list, facts) {
  const rows = facts.filter(([, value]) => value !== null && value !== "");
  patch(
    list,
    rows,
    ([term]) => term,
    ([term]) => el("div", {}, el("dt", {}, term), el("dd")),
    (node, [, value]) => {
      const place = node.lastElementChild;
      if (typeof value === "string") put(place, value);
      else if (place.firstElementChild?.outerHTML !== value.outerHTML) place.replaceChildren(value);
    },
  );
}

/** Show an error's message and hint, or hide the place when there is none. */
function putError(place, error) {
  place.hidden = !error;
  if (!error) return place.replaceChildren();
  const lines = [el("p", { class: "error-message" }, error.message)];
  if (error.hint) lines.push(el("p", {}, error.hint));
  return place.replaceChildren(...lines);
}

/* --- Words ---------------------------------------------------------------------------------------------- */

const whole = new Intl.NumberFormat("en");
const dayFormat = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });
const timeFormat = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const now_ms = () => Date.now() + known.skew_ms;
const count = (n, one, many) => `${whole.format(n)} ${n === 1 ? one : many}`;
const list = (numbers) => numbers.join(", ");
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const has = (value) => value !== null && value !== undefined;
const isOpen = (request) => request.state !== "repaired";

function sentence(text) {
  return text ? text[0].toUpperCase() + text.slice(1) : "";
}

/** A length of time as a person says it: the two largest units. */
function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 1) return `${Math.round(1000 * s)} ms`;
  if (s < 10) return `${Number(s.toFixed(1))} s`;
  const t = Math.floor(s);
  if (t < 60) return `${t} s`;
  if (t < 3600) return `${Math.floor(t / 60)} min ${t % 60} s`;
  if (t < 86400) return `${Math.floor(t / 3600)} h ${Math.floor((t % 3600) / 60)} min`;
  const days = Math.floor(t / 86400);
  return days < 10 ? `${count(days, "day", "days")} ${Math.floor((t % 86400) / 3600)} h` : `${days} days`;
}

/** A date and time in the reader's zone; the day is left out when it is today. */
function moment(at) {
  const date = new Date(at);
  if (Number.isNaN(date.getTime())) return String(at);
  const today = dayFormat.format(date) === dayFormat.format(new Date(now_ms()));
  return today ? timeFormat.format(date) : `${dayFormat.format(date)}, ${timeFormat.format(date)}`;
}

const time = (at) => el("time", { datetime: at }, moment(at));

/** How long ago, without fractions: a clock that runs. */
function since(at) {
  const s = Math.max(0, Math.floor((now_ms() - Date.parse(at)) / 1000));
  return s < 10 ? `${s} s` : duration(s);
}

function due(request) {
  if (!request.due_at) return "";
  const day = dayFormat.format(new Date(request.due_at));
  if (!isOpen(request)) return day;
  const days = Math.floor((Date.parse(request.due_at) - now_ms()) / 86400000);
  if (days < 0) return `${day}, overdue`;
  return days === 0 ? `${day}, less than a day left` : `${day}, ${count(days, "day", "days")} left`;
}

function isOverdue(request) {
  return isOpen(request) && request.due_at && Date.parse(request.due_at) < now_ms();
}

/** Whom a request is about; the counts only, since the ids are nobody's business here. */
function about(request) {
  const people = request.subjects ? [count(request.subjects, "subject", "subjects")] : [];
  return [...people, count(request.records, "record", "records")].join(", ");
}

/** Every clock on the page moves on by itself, outside of live regions, so that nobody has to hear it tick. */
function tick() {
  for (const node of document.querySelectorAll("[data-since]")) put(node, since(node.dataset.since));
  if (known.retryAt_ms) {
    const left = Math.max(0, Math.ceil((known.retryAt_ms - Date.now()) / 1000));
    put($("connection-next"), left ? `Next try in ${left} s.` : "Trying …");
  }
}

/** Say what changed through the live region; that of the open dialog, since all outside of it is inert. */
function announce(messages) {
  if (!messages.length) return;
  const place = document.querySelector("dialog[open] .live") ?? $("live");
  place.textContent = "";
  setTimeout(() => { place.textContent = messages.join(" "); }, HUSH_MS);
}

/* --- Asking the server ---------------------------------------------------------------------------------- */

/** The server refused, or there was no answer (status 0). */
class Failed extends Error {
  constructor(message, { status = 0, hint = "", wait_ms = 0 } = {}) {
    super(message);
    this.status = status;
    this.hint = hint;
    this.wait_ms = wait_ms;
  }

  /** The token is at fault: nothing helps but another one. */
  get token() {
    return this.status === 401 || this.status === 403;
  }
}

/** Ask with the token; a 304 is an answer, every other failure is a `Failed`. */
async function ask(path, { method = "GET", headers = {}, body = null, patience_ms = PATIENCE_MS } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: { Accept: "application/json", Authorization: `Bearer ${known.token}`, ...headers },
      body,
      cache: "no-store",
      signal: AbortSignal.timeout(patience_ms),
    });
  } catch {
    throw new Failed("No answer from the server.", { hint: "It may be restarting, or the network is down." });
  }
  if (response.ok || response.status === 304) return response;
  throw await refusal(response);
}

async function refusal(response) {
  const answer = await response.json().catch(() => null);
  const error = answer?.error;
  const wait_s = Number(response.headers.get("Retry-After"));
  return new Failed(String(error?.message ?? `The server answered ${response.status}.`), {
    status: response.status,
    hint: String(error?.hint ?? ""),
    wait_ms: wait_s > 0 ? 1000 * wait_s : 0,
  });
}

async function json(response) {
  try {
    return await response.json();
  } catch {
    throw new Failed("The server’s answer was cut short or isn’t JSON.", { status: response.status });
  }
}

/* --- The state, again and again ------------------------------------------------------------------------- */

/** Ask for the state now, show it if it is new, and plan the next time. */
async function poll() {
  clearTimeout(known.timer);
  if (known.polling) {
    known.again = true;
    return;
  }
  known.polling = true;
  const session = known.session;
  let failure = null;
  try {
    await refresh(session);
  } catch (error) {
    failure = error;
  }
  known.polling = false;
  if (session !== known.session) {
    if (known.token) poll(); // another sign-in waited for this answer
    return;
  }
  if (failure) failed(failure);
  else reached();
}

async function refresh(session) {
  const response = await ask("state", { headers: known.etag ? { "If-None-Match": known.etag } : {} });
  if (response.status === 304) return;
  const state = await json(response);
  if (session !== known.session) return;
  known.etag = response.headers.get("ETag") ?? "";
  known.skew_ms = Date.parse(state.now) - Date.now() || 0;
  const before = known.state;
  known.state = state;
  show(state);
  announce(before ? news(before, state) : []);
  if (detail.request) loadDetail();
}

function reached() {
  known.freshAt_ms = now_ms();
  if (known.failures) {
    announce(["Connection restored."]);
    if ($("connection").contains(document.activeElement)) $("content").focus();
    $("connection").hidden = true;
  }
  known.failures = 0;
  known.retryAt_ms = 0;
  setClass($("freshness"), "freshness");
  put($("freshness-text"), "Up to date");
  plan(known.again ? 0 : known.state?.open_requests ? BUSY_MS : IDLE_MS);
}

function failed(error) {
  if (!(error instanceof Failed)) {
    // A mistake in this script, or a state of another shape: say it here and in the console, and keep asking.
    setTimeout(() => { throw error; });
    error = new Failed("The server’s state could not be shown.", { status: 1, hint: "Page and server may differ in version: reload the page." });
  }
  if (error.token) return signOut(error);
  const lost = error.status === 0;
  const wait_ms = Math.max(error.wait_ms, BACKOFF_MS[Math.min(known.failures, BACKOFF_MS.length - 1)]);
  const text = lost ? "Connection lost, retrying." : "The server can’t answer now, retrying.";
  if (!known.failures) announce([text]);
  known.failures += 1;
  put($("connection-text"), text);
  put($("connection-detail"), lost ? shownSince() : `${error.message} ${error.hint}`.trim());
  $("connection").hidden = false;
  setClass($("freshness"), "freshness stale");
  put($("freshness-text"), "Not up to date");
  known.retryAt_ms = Date.now() + wait_ms;
  tick();
  return plan(wait_ms);
}

function shownSince() {
  return known.state ? `What you see is as of ${moment(new Date(known.freshAt_ms).toISOString())}.` : "";
}

function plan(wait_ms) {
  known.again = false;
  clearTimeout(known.timer);
  known.timer = setTimeout(poll, wait_ms);
}

/** What changed between two states, as sentences. */
function news(before, after) {
  const messages = [];
  const old = new Map(before.requests.map((request) => [request.request, request]));
  const moved = after.requests.filter((request) => old.get(request.request)?.state !== request.state);
  if (moved.length > 3) messages.push(`${whole.format(moved.length)} deletions moved on.`);
  else messages.push(...moved.map((request) => `${request.request}: ${STEP_NAMES[request.state] ?? request.state}.`));
  if (before.version !== after.version) messages.push(`Version ${after.version} is live.`);
  if (before.state !== after.state) messages.push(`The store’s state: ${after.state}.`);
  return messages;
}

/* --- Signing in and out --------------------------------------------------------------------------------- */

function showDoor(reason) {
  $("door").hidden = false;
  for (const id of ["board", "loading", "nav", "sign-out", "freshness", "connection"]) $(id).hidden = true;
  document.title = "Sign in · sisa";
  putError($("token-error"), reason);
  $("token").toggleAttribute("aria-invalid", false);
  if (reason instanceof Failed) $("token").setAttribute("aria-invalid", "true");
  $("token").focus();
}

function showBoard() {
  $("door").hidden = true;
  $("loading").hidden = true;
  for (const id of ["board", "nav", "sign-out", "freshness"]) $(id).hidden = false;
}

/** Try a token; it is kept only if the server takes it. */
async function signIn(event) {
  event.preventDefault();
  const token = $("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(token)) {
    showDoor(new Failed(token ? "A token has no spaces and no letters beyond ASCII." : "Enter a token."));
    return;
  }
  const button = $("sign-in");
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  put(button, "Signing in …");
  known.token = token;
  known.session += 1;
  try {
    await refresh(known.session);
    sessionStorage.setItem(TOKEN_KEY, token);
    $("token").value = "";
    reached();
    $("store").focus();
  } catch (error) {
    if (error instanceof Failed) signOut(error);
    else failed(error);
  } finally {
    button.removeAttribute("aria-disabled");
    put(button, "Sign in");
  }
}

/** Forget the token and the state. With a reason the form's contents stay, for whoever has a better token. */
function signOut(reason = null) {
  clearTimeout(known.timer);
  sessionStorage.removeItem(TOKEN_KEY);
  Object.assign(known, { token: "", session: known.session + 1, etag: "", state: null, failures: 0, retryAt_ms: 0 });
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  for (const id of SERVED) $(id).replaceChildren();
  delete $("chart").dataset.drawn;
  $("delete-done").hidden = true;
  if (!reason) {
    $("delete-form").reset();
    nameKind();
    putError($("delete-error"), null);
  }
  showDoor(reason);
}

/* --- Showing a state ------------------------------------------------------------------------------------ */

function show(state) {
  showBoard();
  showStatus(state);
  showMap(state);
  showRequests(state);
  showVersions(state);
  showReplicas(state);
  tick();
}

function aggregation({ aggregation: declared, aggregation_in_use: used }) {
  return declared === used ? used : `the ${used} until ${declared.replaceAll("_", " ")} is fitted again`;
}

function showStatus(state) {
  const open = state.open_requests;
  document.title = `${state.store}${open ? ` · ${open} open` : ""} · sisa`;
  put($("store"), state.store);
  const sizes = [
    `${count(state.records, "record", "records")} of ${count(state.subjects, "subject", "subjects")}`,
    `${count(state.shards, "shard", "shards")} × ${count(state.slices, "slice", "slices")}`,
    `${count(state.classes.length, "class", "classes")}, aggregated by ${aggregation(state)}`,
    count(state.holdout_records, "holdout record", "holdout records"),
  ];
  patch($("summary"), sizes, (text) => text, (text) => el("li", {}, text), () => {});
  put($("tile-state"), sentence(state.state));
  setClass($("tile-state"), `state state-${state.state.replace(/\W+/g, "-")}`);
  put($("tile-version"), `v${state.version}`);
  put($("tile-open"), whole.format(open));
  setClock($("tile-oldest"), state.oldest_open_at);
}

/** A clock that runs from `at`, or a dash. */
function setClock(node, at) {
  if (at) {
    node.dataset.since = at;
    put(node, since(at));
  } else {
    delete node.dataset.since;
    put(node, "–");
  }
}

/* The ensemble: shards x stages. */

const isOut = (stage) => stage.state === "quarantined" || stage.state === "retraining";

function showMap(state) {
  const rows = new Map();
  const counts = new Map(STAGES.map(([name]) => [name, 0]));
  for (const stage of state.stages) {
    if (!rows.has(stage.shard)) rows.set(stage.shard, []);
    rows.get(stage.shard).push(stage);
    counts.set(stage.state, (counts.get(stage.state) ?? 0) + 1);
  }
  let shards = [...rows].map(([shard, stages]) => ({ shard, stages: stages.sort((a, b) => a.stage - b.stage), out: stages.some(isOut) }));
  shards.sort((a, b) => a.shard - b.shard);
  if (view.first) shards = [...shards.filter((row) => row.out), ...shards.filter((row) => !row.out)];
  const pages = Math.max(1, Math.ceil(shards.length / SHARDS_PER_PAGE));
  view.page = Math.min(view.page, pages - 1);
  const begin = view.page * SHARDS_PER_PAGE;
  const shown = shards.slice(begin, begin + SHARDS_PER_PAGE);
  showLegend(counts);
  showMapTools(shards.length, pages);
  const out = shards.filter((row) => row.out).length;
  const which = pages > 1 ? `Shards ${begin + 1} to ${begin + shown.length} of ${whole.format(shards.length)}` : count(shards.length, "shard", "shards");
  put($("map-caption"), `${which}; ${out ? `${whole.format(out)} with stages out of service` : "all in service"}`);
  showRows(shown, state.slices - (state.generations ?? 0));
}

function showLegend(counts) {
  patch(
    $("legend"),
    STAGES,
    ([name]) => name,
    ([name, word]) => el("li", {}, swatch(name), el("span", {}, word), " ", el("strong")),
    (node, [name]) => {
      put(node.lastElementChild, whole.format(counts.get(name)));
      setClass(node, counts.get(name) ? "" : "none");
    },
  );
}

const swatch = (state) => el("span", { class: `swatch swatch-${state}`, "aria-hidden": "true" });

function showMapTools(shards, pages) {
  $("map-tools").hidden = shards <= 8;
  $("map-pager").hidden = pages === 1;
  const select = $("map-page");
  if (select.length !== pages) select.replaceChildren(...Array.from({ length: pages }, (_, page) => el("option", { value: page }, String(page + 1))));
  select.value = String(view.page);
  put($("map-pages"), `of ${pages}`);
  $("map-previous").setAttribute("aria-disabled", String(view.page === 0));
  $("map-next").setAttribute("aria-disabled", String(view.page === pages - 1));
}

function showRows(shown, first) {
  const columns = shown.length ? shown[0].stages.map((stage) => stage.stage) : [];
  patch(
    $("map-head"),
    [`${columns.join()}/${first}`],
    (key) => key,
    () => el("tr", {}, el("th", { scope: "col" }, "Shard"), ...columns.map((stage) => el("th", { scope: "col" }, stage > first ? `Stage ${stage}, generation ${stage - first}` : `Stage ${stage}`))),
    () => {},
  );
  // Rows are kept by their place, not by their shard: turning a page rewrites texts and builds nothing.
  patch(
    $("map-body"),
    shown.map((row, place) => ({ ...row, key: `${place}/${columns.length}` })),
    (row) => row.key,
    (row) => el("tr", {}, el("th", { scope: "row" }), ...row.stages.map(makeCell)),
    (node, row) => {
      put(node.firstElementChild, `Shard ${row.shard}`);
      row.stages.forEach((stage, place) => setCell(node.children[place + 1], stage));
    },
  );
}

function makeCell() {
  const words = el("span", { class: "stage-words" }, el("span", { class: "stage-name" }), el("span", { class: "stage-records" }));
  return el("td", {}, el("div", { class: "stage" }, swatch("empty"), words));
}

function setCell(cell, stage) {
  const box = cell.firstElementChild;
  const [mark, words] = box.children;
  setClass(box, `stage stage-${stage.state}`);
  setClass(mark, `swatch swatch-${stage.state}`);
  put(words.firstElementChild, STAGE_NAMES[stage.state] ?? stage.state);
  put(words.lastElementChild, count(stage.records, "record", "records"));
}

function turnTo(page) {
  const last = $("map-page").length - 1;
  if (page < 0 || page > last) return;
  view.page = page;
  showMap(known.state);
  document.querySelector(".map-scroll").scrollTop = 0;
  announce([`${$("map-caption").textContent}.`]);
}

/* Deletions. */

function showRequests(state) {
  const newest = [...state.requests].reverse();
  const chosen = view.openOnly ? newest.filter(isOpen) : newest;
  const none = $("requests-none");
  none.hidden = chosen.length > 0;
  put(none, view.openOnly ? "No request is open." : "Nobody has asked for a deletion yet.");
  patch($("request-list"), chosen.slice(0, view.requests), (request) => request.request, makeRequest, setRequest);
  const left = chosen.length - view.requests;
  $("requests-more").hidden = left <= 0;
  put($("requests-more"), `Show more (${left})`);
}

function makeRequest(request) {
  const open = el("button", { type: "button", class: "button small", "aria-label": `Details of ${request.request}`, "aria-haspopup": "dialog" }, "Details");
  open.addEventListener("click", () => openDetail(request.request));
  return el(
    "li",
    { class: "request" },
    el("div", { class: "request-head" }, el("h3", { class: "mono" }, request.request), el("p", { class: "request-clock" }), open),
    el("ol", { class: "steps", "aria-label": "Progress" }),
    el("dl", { class: "facts inline" }),
  );
}

function setRequest(node, request) {
  setClass(node, isOpen(request) ? "request open" : "request");
  setRequestClock(node.querySelector(".request-clock"), request);
  setSteps(node.querySelector(".steps"), request.state);
  fillFacts(node.querySelector(".facts"), [
    ["About", about(request)],
    ["Shards", list(request.shards)],
    ["To quarantine", has(request.seconds_to_quarantine) ? duration(request.seconds_to_quarantine) : ""],
    ["Law", REGIMES[request.regime] ?? request.regime],
    ["Due", due(request)],
    ["Reason", request.reason],
    ["Note", request.note ?? ""],
  ]);
  node.toggleAttribute("data-overdue", Boolean(isOverdue(request)));
}

/** Open: a running clock. Repaired: when, and how long it took. */
function setRequestClock(node, request) {
  const key = isOpen(request) ? request.created_at : `${request.updated_at} done`;
  if (node.dataset.shown === key) return;
  node.dataset.shown = key;
  if (isOpen(request)) {
    node.replaceChildren("Open for ", el("span", { "data-since": request.created_at, class: "clock" }, since(request.created_at)));
  } else {
    const took_s = (Date.parse(request.updated_at) - Date.parse(request.created_at)) / 1000;
    node.replaceChildren(time(request.updated_at), ` · took ${duration(took_s)}`);
  }
}

/** The stepper: each step says in words whether it is done, now or to come. */
function setSteps(listed, state) {
  const at = STEPS.findIndex(([name]) => name === state);
  patch(
    listed,
    STEPS.map(([name, word], place) => ({ name, word, mark: stepMark(place, at) })),
    (step) => step.name,
    (step) => el("li", {}, el("span", { class: "step-mark", "aria-hidden": "true" }), el("span", {}, step.word), el("span", { class: "hush" })),
    (node, { mark }) => {
      setClass(node, `step step-${mark}`);
      put(node.lastElementChild, { done: ", done", now: ", now", next: ", to come" }[mark]);
      if (mark === "now") node.setAttribute("aria-current", "step");
      else node.removeAttribute("aria-current");
    },
  );
}

function stepMark(place, at) {
  if (place < at || at === STEPS.length - 1) return "done";
  return place === at ? "now" : "next";
}

/* Versions. */

function showVersions(state) {
  const newest = [...state.versions].reverse();
  patch(
    $("versions-body"),
    newest.slice(0, view.versions),
    (version) => version.number,
    () => el("tr", {}, el("th", { scope: "row" }), el("td"), el("td", { class: "number" }), el("td", { class: "number" }), el("td", { class: "nowrap" })),
    (node, version) => {
      const [number, cause, voters, accuracy, published] = node.children;
      const live = version.number === state.version;
      if (number.dataset.live !== String(live)) {
        number.dataset.live = String(live);
        number.replaceChildren(`v${version.number}`, ...(live ? [" ", el("span", { class: "tag" }, "live")] : []));
      }
      put(cause, CAUSES[version.cause] ?? version.cause);
      put(voters, whole.format(version.voters));
      put(accuracy, has(version.accuracy) ? percent(version.accuracy) : "not measured");
      put(published, moment(version.created_at));
    },
  );
  const left = newest.length - view.versions;
  $("versions-more").hidden = left <= 0;
  put($("versions-more"), `Show all versions (${newest.length})`);
  drawChart(state);
}

const PLOT = { height: 190, left: 52, right: 14, top: 16, bottom: 28 };

/** The plot, drawn for the width at hand, so that its letters keep their size on every screen. */
function drawChart(state) {
  const place = $("chart");
  const width = place.clientWidth;
  const measured = state.versions.filter((version) => has(version.accuracy));
  const drawn = JSON.stringify([width, state.version, state.versions.map((v) => [v.number, v.accuracy, v.cause])]);
  if (!width || place.dataset.drawn === drawn) return;
  place.dataset.drawn = drawn;
  if (!measured.length) {
    place.replaceChildren(el("p", { class: "empty" }, "No version’s accuracy has been measured yet."));
    $("chart-legend").replaceChildren();
    return;
  }
  const scale = scales(state.versions, measured, width);
  const title = svg("title", { id: "chart-title" }, "Accuracy over versions");
  const text = svg("desc", { id: "chart-text" }, describe(state, measured));
  const attributes = { role: "img", "aria-labelledby": "chart-title chart-text", width, height: PLOT.height, viewBox: `0 0 ${width} ${PLOT.height}` };
  place.replaceChildren(svg("svg", attributes, title, text, ...axes(scale, width), ...curve(state, scale)));
  const causes = Object.keys(CAUSES).filter((cause) => measured.some((version) => version.cause === cause));
  $("chart-legend").replaceChildren(...causes.map((cause) => el("li", {}, legendMark(cause), CAUSES[cause])));
}

function scales(versions, measured, width) {
  const shares = measured.map((version) => version.accuracy);
  const step = niceStep(Math.max(Math.max(...shares) - Math.min(...shares), 0.004) / 3);
  const low = Math.max(0, Math.floor(Math.min(...shares) / step - 0.25) * step);
  const high = Math.min(1, Math.ceil(Math.max(...shares) / step + 0.25) * step);
  const first = versions[0].number;
  const last = versions[versions.length - 1].number;
  const span = Math.max(1, last - first);
  const inner = width - PLOT.left - PLOT.right - 16;
  const x = (number) => PLOT.left + 8 + (first === last ? inner / 2 : ((number - first) / span) * inner);
  const y = (share) => PLOT.top + (1 - (share - low) / (high - low || 1)) * (PLOT.height - PLOT.top - PLOT.bottom);
  const ticks = [];
  for (let share = low; share <= high + step / 1000; share += step) ticks.push(share);
  const stride = Math.max(1, Math.ceil(span / 6));
  const numbers = [];
  for (let number = last; number >= first; number -= stride) numbers.push(number);
  return { x, y, ticks, numbers, digits: step < 0.01 ? 1 : 0 };
}

/** 1, 2 or 5 times a power of ten, not smaller than `least`. */
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * ([1, 2, 5].find((factor) => factor * power >= least * 0.999) ?? 10);
}

function axes({ x, y, ticks, numbers, digits }, width) {
  const across = ticks.flatMap((share) => [
    svg("line", { class: "grid", x1: PLOT.left, x2: width - PLOT.right, y1: y(share), y2: y(share) }),
    svg("text", { class: "tick", x: PLOT.left - 8, y: y(share) + 4, "text-anchor": "end" }, `${(100 * share).toFixed(digits)} %`),
  ]);
  const below = numbers.map((number) => svg("text", { class: "tick", x: x(number), y: PLOT.height - 8, "text-anchor": "middle" }, `v${number}`));
  return [...across, ...below];
}

/** The line, broken where nothing was measured, and one mark for each version, its shape by the cause. */
function curve(state, { x, y }) {
  let path = "";
  let drawing = false;
  const marks = [];
  for (const version of state.versions) {
    if (!has(version.accuracy)) {
      drawing = false;
      continue;
    }
    const [left, top] = [x(version.number), y(version.accuracy)];
    path += `${drawing ? "L" : "M"}${left.toFixed(1)} ${top.toFixed(1)}`;
    drawing = true;
    const text = `Version ${version.number}, ${CAUSES[version.cause] ?? version.cause}: ${percent(version.accuracy)}`;
    const live = version.number === state.version ? " live" : "";
    marks.push(svg("path", { class: `mark mark-${version.cause}${live}`, d: markPath(version.cause, left, top, 4.5) }, svg("title", {}, text)));
  }
  return [svg("path", { class: "line", d: path }), ...marks];
}

function markPath(cause, x, y, r) {
  if (cause === "quarantine") return `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`;
  if (cause === "repair") return `M${x} ${y - r - 1.5}L${x + r + 1.5} ${y}L${x} ${y + r + 1.5}L${x - r - 1.5} ${y}z`;
  if (cause === "fit") return `M${x} ${y + r + 1}L${x + r + 1} ${y - r}L${x - r - 1} ${y - r}z`;
  if (cause === "add") return `M${x - r} ${y}h${2 * r}M${x} ${y - r}v${2 * r}`;
  if (cause === "upgrade") return `M${x} ${y - r - 1}L${x + r + 1} ${y + r}L${x - r - 1} ${y + r}z`;
  return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
}

function legendMark(cause) {
  return svg("svg", { width: 16, height: 16, viewBox: "0 0 16 16" }, svg("path", { class: `mark mark-${cause}`, d: markPath(cause, 8, 8, 4.5) }));
}

function describe(state, measured) {
  const ordered = [...measured].sort((a, b) => a.accuracy - b.accuracy);
  const [low, high, last] = [ordered[0], ordered[ordered.length - 1], measured[measured.length - 1]];
  return (
    `Lowest ${percent(low.accuracy)} (version ${low.number}), highest ${percent(high.accuracy)} (version ${high.number}), ` +
    `last ${percent(last.accuracy)} (version ${last.number}). Version ${state.version} is live. The table below holds every number.`
  );
}

/* Replicas. */

function showReplicas(state) {
  put($("replicas-help"), `A replica that can’t confirm its version stops answering within ${duration(state.lease_seconds).replaceAll(" ", "\u00a0")}.`);
  $("replicas-none").hidden = state.replicas.length > 0;
  patch(
    $("replica-list"),
    state.replicas,
    (replica) => replica.id,
    (replica) => el("li", {}, el("span", { class: "mono" }, replica.id), el("span", { class: "replica-version" }), el("span")),
    (node, replica) => {
      const [, version, confirmed] = node.children;
      put(version, replica.version > 0 || !replica.confirmed ? `v${replica.version} or newer` : "live");
      put(confirmed, replica.confirmed ? "✓ confirmed" : "○ not confirmed");
      setClass(confirmed, replica.confirmed ? "confirmed" : "unconfirmed");
    },
  );
}

/* --- One deletion --------------------------------------------------------------------------------------- */

function openDetail(request) {
  detail.request = request;
  put($("detail-title"), request);
  putError($("detail-error"), null);
  $("detail-content").hidden = true;
  $("detail-loading").hidden = false;
  $("detail").showModal();
  $("detail-title").focus();
  loadDetail();
}

async function loadDetail() {
  const { request } = detail;
  const asked = (detail.asked += 1);
  const session = known.session;
  const isCurrent = () => detail.request === request && detail.asked === asked && session === known.session;
  try {
    const answer = await json(await ask(`deletions/${encodeURIComponent(request)}`));
    if (!isCurrent()) return;
    putError($("detail-error"), null);
    showDetail(answer);
  } catch (error) {
    if (!isCurrent()) return;
    if (!(error instanceof Failed)) throw error;
    if (error.token) signOut(error);
    else putError($("detail-error"), error);
  }
  $("detail-loading").hidden = true;
}

function showDetail(request) {
  const { stages_purged: purged, stages_retrained: retrained } = request.evidence;
  setSteps($("detail-steps"), request.state);
  const after = request.version_after ?? request.evidence.version_after;
  fillFacts($("detail-facts"), [
    ["Asked", time(request.created_at)],
    ["Last change", time(request.updated_at)],
    ["Due", due(request)],
    ["Law", REGIMES[request.regime] ?? request.regime],
    ["Reason", request.reason],
    ["About", about(request)],
    ["Shards", list(request.shards)],
    ["Slices", list(request.slices)],
    ["To quarantine", has(request.seconds_to_quarantine) ? duration(request.seconds_to_quarantine) : ""],
    ["Versions", versionsOf(request, after)],
    ["Note", request.note ?? ""],
  ]);
  patch(
    $("detail-timeline"),
    request.timeline.map((event, place) => ({ ...event, place })),
    (event) => `${event.place} ${event.at} ${event.what}`,
    (event) => el("li", {}, time(event.at), el("span", {}, sentence(event.what))),
    () => {},
  );
  put($("detail-evidence"), evidenceText(request, purged, retrained, after));
  fillRows($("purged-body"), purged.map((row) => [`Shard ${row.shard}`, `Stage ${row.stage}`, moment(row.at)]), "None yet");
  fillRows($("retrained-body"), retrained.map((row) => [`Shard ${row.shard}`, `Stage ${row.stage}`, moment(row.at), row.worker ?? ""]), "None yet");
  $("detail-content").hidden = false;
}

function versionsOf(request, after) {
  const parts = [`v${request.version_before} before`];
  if (has(request.version_quarantine)) parts.push(`v${request.version_quarantine} quarantine`);
  if (has(after)) parts.push(`v${after} repaired`);
  return parts.join(" → ");
}

function evidenceText(request, purged, retrained, after) {
  const texts = [`${count(purged.length, "stage", "stages")} purged, ${whole.format(retrained.length)} retrained.`];
  if (has(request.version_quarantine)) texts.push(`From version ${request.version_quarantine} on, no stage that saw the rows answers.`);
  if (has(after)) texts.push(`Version ${after} answers with the retrained stages.`);
  return texts.join(" ");
}

function fillRows(body, rows, none) {
  const columns = body.closest("table").tHead.rows[0].cells.length;
  const filled = rows.length ? rows : [[none]];
  patch(
    body,
    filled.map((cells, place) => ({ cells, key: `${place} ${cells.join(" ")}` })),
    (row) => row.key,
    ({ cells }) => {
      if (cells.length === 1) return el("tr", {}, el("td", { colspan: columns, class: "empty" }, cells[0]));
      return el("tr", {}, el("th", { scope: "row" }, cells[0]), ...cells.slice(1).map((text) => el("td", {}, text)));
    },
    () => {},
  );
}

/* --- Asking for a deletion ------------------------------------------------------------------------------ */

const chosenKind = () => document.querySelector('input[name="kind"]:checked').value;

function nameKind() {
  put($("ids-label"), chosenKind() === "subjects" ? "Ids of the people, one per line" : "Ids of the records, one per line");
}

const named = (kind, n) => (kind === "subjects" ? count(n, "subject", "subjects") : count(n, "record", "records"));

/** First step: read the form and repeat what it asks for. */
function review(event) {
  event.preventDefault();
  const lines = $("ids").value.split("\n").filter((line) => line.trim() !== "");
  const ids = [...new Set(lines)];
  if (!ids.length) {
    putError($("delete-error"), new Failed("No id was given.", { hint: "Write each id on its own line." }));
    $("ids").setAttribute("aria-invalid", "true");
    $("ids").focus();
    return;
  }
  $("ids").removeAttribute("aria-invalid");
  putError($("delete-error"), null);
  const kind = chosenKind();
  const body = { [kind]: ids, reason: $("reason").value.trim(), regime: $("regime").value };
  draft.body = body;
  // The key stays the same as long as the request does: sent again after a lost answer, it is still one request.
  const fingerprint = JSON.stringify(body);
  if (draft.fingerprint !== fingerprint) Object.assign(draft, { fingerprint, key: randomKey() });
  showConfirm(kind, ids, lines.length - ids.length);
}

function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function showConfirm(kind, ids, repeated) {
  put($("confirm-title"), `Delete ${named(kind, ids.length)}?`);
  put($("confirm-text"), "At once no prediction uses a model that saw them. Then their rows and every stage that saw them are erased. This can’t be undone.");
  $("confirm-ids").replaceChildren(...ids.map((id) => el("li", {}, el("code", {}, id))));
  const edges = ids.filter((id) => id !== id.trim()).length;
  const notes = [];
  if (repeated) notes.push(`${count(repeated, "repeated line was", "repeated lines were")} left out.`);
  if (edges) notes.push(`${count(edges, "id begins or ends", "ids begin or end")} with a space, which is taken as part of the id.`);
  $("confirm-notes").hidden = !notes.length;
  put($("confirm-notes"), notes.join(" "));
  fillFacts($("confirm-facts"), [["Reason", draft.body.reason || "none"], ["Law", REGIMES[draft.body.regime] ?? "none"]]);
  put($("confirm-go"), `Delete ${named(kind, ids.length)}`);
  putError($("confirm-error"), null);
  $("confirm").showModal();
  $("confirm-back").focus();
}

/** Second step: send it. */
async function submit() {
  if (draft.sending) return;
  draft.sending = true;
  const button = $("confirm-go");
  const label = button.textContent;
  button.setAttribute("aria-disabled", "true");
  put(button, "Deleting …");
  const session = known.session;
  try {
    const headers = { "Content-Type": "application/json", "Idempotency-Key": draft.key };
    const response = await ask("deletions", { method: "POST", headers, body: JSON.stringify(draft.body), patience_ms: ACCEPT_PATIENCE_MS });
    const answer = await json(response);
    if (session === known.session) accepted(answer);
  } catch (error) {
    if (session !== known.session) return;
    if (!(error instanceof Failed)) throw error;
    refused(error);
  } finally {
    draft.sending = false;
    button.removeAttribute("aria-disabled");
    if (button.textContent === "Deleting …") put(button, label);
  }
}

function refused(error) {
  const lost = new Failed("No answer came, so it isn’t known whether the request was accepted.", { hint: "Send it again: the same request is never made twice." });
  if (error.token) signOut(error);
  else putError($($("confirm").open ? "confirm-error" : "delete-error"), error.status === 0 ? lost : error);
}

function accepted(answer) {
  $("confirm").close();
  $("delete-form").reset();
  nameKind();
  Object.assign(draft, { body: null, fingerprint: "", key: "" });
  const missing = answer.missing ?? [];
  const texts = [
    answer.repeated ? "This had been asked for before; nothing was started twice." : "",
    has(answer.version_quarantine) ? `Version ${answer.version_quarantine} answers without what saw them.` : "",
    missing.length ? `Not known to the store: ${missing.join(", ")}.` : "",
  ];
  put($("delete-done-title"), `${answer.repeated ? "Already accepted" : "Accepted"}: ${answer.request}`);
  put($("delete-done-text"), texts.filter(Boolean).join(" "));
  $("delete-done-details").dataset.request = answer.request;
  $("delete-done").hidden = false;
  $("delete-done").focus();
  poll();
}

/* --- Start ---------------------------------------------------------------------------------------------- */

function listen() {
  $("token-form").addEventListener("submit", signIn);
  $("sign-out").addEventListener("click", () => signOut());
  $("retry").addEventListener("click", poll);
  $("map-first").addEventListener("change", (event) => {
    view.first = event.target.checked;
    turnTo(0);
  });
  $("map-previous").addEventListener("click", () => turnTo(view.page - 1));
  $("map-next").addEventListener("click", () => turnTo(view.page + 1));
  $("map-page").addEventListener("change", (event) => turnTo(Number(event.target.value)));
  $("requests-open").addEventListener("change", (event) => {
    view.openOnly = event.target.checked;
    showRequests(known.state);
  });
  $("requests-more").addEventListener("click", moreRequests);
  $("versions-more").addEventListener("click", () => {
    view.versions = Infinity;
    showVersions(known.state);
    document.querySelector("#versions .scroll").focus();
  });
  for (const radio of document.querySelectorAll('input[name="kind"]')) radio.addEventListener("change", nameKind);
  $("delete-form").addEventListener("submit", review);
  $("delete-done-details").addEventListener("click", (event) => openDetail(event.currentTarget.dataset.request));
  $("confirm-back").addEventListener("click", () => { if (!draft.sending) $("confirm").close(); });
  $("confirm").addEventListener("close", () => $("confirm-ids").replaceChildren());
  $("confirm").addEventListener("cancel", (event) => { if (draft.sending) event.preventDefault(); });
  $("confirm-go").addEventListener("click", submit);
  $("detail-close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("close", () => { detail.request = ""; });
  for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("click", closeOutside);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && known.token && known.state) poll();
  });
  new ResizeObserver(() => { if (known.state) drawChart(known.state); }).observe($("chart"));
}

/** Show more requests, and move on to the first new one. */
function moreRequests() {
  const before = view.requests;
  view.requests += 20;
  showRequests(known.state);
  $("request-list").children[before]?.querySelector("button").focus();
}

/** A click beside an open dialog closes it. */
function closeOutside(event) {
  if (event.target === event.currentTarget && !draft.sending) event.currentTarget.close();
}

function start() {
  $("meanings").replaceChildren(...STAGES.map(([name, word, meaning]) => el("div", {}, el("dt", {}, swatch(name), word), el("dd", {}, meaning))));
  listen();
  setInterval(tick, 1000);
  known.token = sessionStorage.getItem(TOKEN_KEY) ?? "";
  if (known.token) {
    $("loading").hidden = false;
    $("sign-out").hidden = false;
    poll();
  } else {
    showDoor(null);
  }
}

start();
