// The pruned digits network beside the dense one, by onnxruntime-web.

const SIZE = 32, CELLS = 8, NAMES = ["dense", "pruned"], TITLES = { dense: "Dense", pruned: "Pruned" };
const ROUNDS = 15, MILLISECONDS = 20; // rounds of a measurement, and how long each network runs in one
const element = (id) => document.getElementById(id);
const made = (name, properties = {}, ...children) => {
  const found = Object.assign(document.createElement(name), properties);
  found.append(...children);
  return found;
};
const shown = (number) => number.toLocaleString("en-US");

const ink = new Uint8Array(SIZE * SIZE); // 1 where the pad is painted
const pen = { row: 8, column: 12, down: false, visible: false };
let ort, sessions, digits, first = 0, running = Promise.resolve();

// One run after the other: a session takes one call at a time.
function inTurn(work) {
  const next = running.then(work);
  running = next.catch(() => {});
  return next.catch(fail);
}

function fail(error) {
  element("status").className = "problem";
  element("status").textContent = `Something went wrong: ${error.message}`;
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

async function logitsOf(name, values, count = 1) {
  const session = sessions[name];
  const input = new ort.Tensor("float32", values, [count, 1, CELLS, CELLS]);
  const outputs = await session.run({ [session.inputNames[0]]: input });
  return outputs[session.outputNames[0]].data;
}

function median(values) {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
}

function best(values) {
  return values.reduce((found, value, place) => (value > values[found] ? place : found), 0);
}

async function classify(values) {
  for (const name of NAMES) {
    const shares = softmax(await logitsOf(name, values));
    const digit = best(shares);
    element(`${name}-digit`).textContent = String(digit);
    shares.forEach((share, place) => {
      element(`${name}-bar-${place}`).style.width = `${(100 * share).toFixed(1)}%`;
      element(`${name}-share-${place}`).textContent = share.toFixed(3);
    });
  }
  const found = NAMES.map((name) => element(`${name}-digit`).textContent);
  element("verdict").textContent = `Dense says ${found[0]}, pruned says ${found[1]}.`;
}

// scikit-learn's digits: what is painted fills the height of 32 points, and each cell counts its 4 x 4 points.
function cellsOfPad() {
  let top = SIZE, bottom = -1, left = SIZE, right = -1;
  ink.forEach((painted, place) => {
    if (!painted) return;
    const row = Math.floor(place / SIZE), column = place % SIZE;
    top = Math.min(top, row); bottom = Math.max(bottom, row);
    left = Math.min(left, column); right = Math.max(right, column);
  });
  if (bottom < 0) return null;
  const side = Math.max(bottom - top + 1, right - left + 1);
  const middle = [(top + bottom + 1) / 2, (left + right + 1) / 2];
  const cells = new Float32Array(CELLS * CELLS);
  for (let row = 0; row < SIZE; row++) {
    for (let column = 0; column < SIZE; column++) {
      const y = Math.floor(middle[0] + ((row + 0.5) / SIZE - 0.5) * side);
      const x = Math.floor(middle[1] + ((column + 0.5) / SIZE - 0.5) * side);
      const painted = y >= 0 && y < SIZE && x >= 0 && x < SIZE && ink[y * SIZE + x];
      if (painted) cells[Math.floor(row / 4) * CELLS + Math.floor(column / 4)] += 1 / 16;
    }
  }
  return cells;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name);
}

function drawPad() {
  const context = element("pad").getContext("2d");
  context.clearRect(0, 0, SIZE, SIZE);
  context.fillStyle = colour("--ink");
  ink.forEach((painted, place) => {
    if (painted) context.fillRect(place % SIZE, Math.floor(place / SIZE), 1, 1);
  });
  if (pen.visible) {
    context.fillStyle = colour("--bar");
    context.fillRect(pen.column - 1, pen.row - 1, 2, 2);
  }
}

function paint(row, column) {
  for (let y = Math.round(row) - 2; y < Math.round(row) + 2; y++) {
    for (let x = Math.round(column) - 2; x < Math.round(column) + 2; x++) {
      if (y >= 0 && y < SIZE && x >= 0 && x < SIZE) ink[y * SIZE + x] = 1;
    }
  }
}

function paintedChanged() {
  drawPad();
  const cells = cellsOfPad();
  if (cells && sessions) inTurn(() => classify(cells));
}

function clearPad() {
  ink.fill(0);
  pen.down = false;
  drawPad();
  for (const name of NAMES) {
    element(`${name}-digit`).textContent = "";
    for (let place = 0; place < 10; place++) {
      element(`${name}-bar-${place}`).style.width = "0";
      element(`${name}-share-${place}`).textContent = "";
    }
  }
  element("verdict").textContent = "";
}

function listenToPad() {
  const pad = element("pad");
  let last = null;
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientY - box.top) / box.height) * SIZE, ((event.clientX - box.left) / box.width) * SIZE];
  };
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    pen.visible = false;
    last = place(event);
    paint(...last);
    drawPad();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    const steps = Math.ceil(Math.hypot(next[0] - last[0], next[1] - last[1])) + 1;
    for (let step = 1; step <= steps; step++) {
      paint(last[0] + ((next[0] - last[0]) * step) / steps, last[1] + ((next[1] - last[1]) * step) / steps);
    }
    last = next;
    drawPad();
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    pad.addEventListener(kind, () => { if (last) paintedChanged(); last = null; });
  }
  pad.addEventListener("blur", () => { pen.visible = false; drawPad(); });
  pad.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-2, 0], ArrowDown: [2, 0], ArrowLeft: [0, -2], ArrowRight: [0, 2] };
    if (event.key in steps) {
      pen.row = Math.min(SIZE - 2, Math.max(2, pen.row + steps[event.key][0]));
      pen.column = Math.min(SIZE - 2, Math.max(2, pen.column + steps[event.key][1]));
    } else if (event.key === " ") {
      pen.down = !pen.down;
    } else if (event.key === "Delete" || event.key === "Backspace") {
      clearPad();
    } else {
      return;
    }
    event.preventDefault();
    pen.visible = true;
    element("pen").textContent = `Row ${pen.row}, column ${pen.column}, pen ${pen.down ? "down" : "up"}.`;
    if (pen.down) {
      paint(pen.row, pen.column);
      paintedChanged();
    } else {
      drawPad();
    }
  });
  element("clear").addEventListener("click", clearPad);
}

function cellsOfSample(place) {
  return Float32Array.from(digits.images[place], (value) => (value === "g" ? 16 : parseInt(value, 16)) / 16);
}

function showSample(place) {
  const cells = cellsOfSample(place);
  ink.fill(0);
  drawPad();
  const context = element("pad").getContext("2d");
  cells.forEach((value, cell) => {
    context.globalAlpha = value;
    context.fillStyle = colour("--ink");
    context.fillRect((cell % CELLS) * 4, Math.floor(cell / CELLS) * 4, 4, 4);
  });
  context.globalAlpha = 1;
  return inTurn(async () => {
    await classify(cells);
    element("verdict").textContent += ` It is a ${digits.labels[place]}.`;
  });
}

// A sample of each digit, from the place on at which the last ones were found.
function listSamples() {
  const buttons = [];
  for (let digit = 0; digit < 10; digit++) {
    const places = digits.labels.flatMap((label, place) => (label === digit ? [place] : []));
    const place = places[first % places.length];
    const picture = made("canvas", { width: CELLS, height: CELLS });
    picture.setAttribute("aria-hidden", "true");
    const context = picture.getContext("2d");
    context.fillStyle = colour("--ink");
    cellsOfSample(place).forEach((value, cell) => {
      context.globalAlpha = value;
      context.fillRect(cell % CELLS, Math.floor(cell / CELLS), 1, 1);
    });
    const button = made("button", { type: "button", onclick: () => showSample(place) }, picture);
    button.setAttribute("aria-label", `Sample of a ${digit}`);
    buttons.push(button);
  }
  element("samples").replaceChildren(...buttons);
  first += 1;
}

// Milliseconds of a run of each network, in turns, so that what else the machine does meets both: medians.
async function measure() {
  const cells = cellsOfSample(0), times = { dense: [], pruned: [] }, counts = {};
  for (const name of NAMES) {
    const begin = performance.now();
    let count = 0;
    while (performance.now() - begin < MILLISECONDS) { await logitsOf(name, cells); count += 1; }
    counts[name] = Math.max(count, 1);
  }
  for (let round = 0; round < ROUNDS; round++) {
    for (const name of NAMES) {
      const begin = performance.now();
      for (let run = 0; run < counts[name]; run++) await logitsOf(name, cells);
      times[name].push((performance.now() - begin) / counts[name]);
    }
  }
  const ratio = median(times.pruned.map((time, round) => time / times.dense[round]));
  for (const name of NAMES) element(`${name}-time`).textContent = `${median(times[name]).toFixed(3)} ms`;
  element("status").textContent = `A run takes the pruned network ${ratio.toFixed(2)} of the time of the dense one.`;
}

async function runAll() {
  const count = digits.labels.length, values = new Float32Array(count * CELLS * CELLS);
  digits.images.forEach((_, place) => values.set(cellsOfSample(place), place * CELLS * CELLS));
  for (const name of NAMES) {
    const logits = await logitsOf(name, values, count);
    const right = digits.labels.filter((label, place) => best(logits.slice(10 * place, 10 * place + 10)) === label);
    element(`${name}-right`).textContent = `${right.length} of ${count}`;
  }
}

function side(name, told) {
  const term = (text, value, id = "") => [made("dt", { textContent: text }), made("dd", { textContent: value, id })];
  const rows = Array.from({ length: 10 }, (_, place) => {
    const bar = made("span", { id: `${name}-bar-${place}`, className: "meter" });
    bar.style.width = "0";
    const head = made("th", { textContent: String(place), scope: "row" });
    return made("tr", {}, head, made("td", {}, bar), made("td", { id: `${name}-share-${place}` }));
  });
  const section = made("section", { className: "side" },
    made("h2", { textContent: TITLES[name], id: `${name}-title` }),
    made("div", { className: "digit", id: `${name}-digit` }),
    made("dl", {}, ...term("a run", "", `${name}-time`), ...term("MACs", shown(told.macs)),
      ...term("parameters", shown(told.parameters)), ...term("file", `${shown(told.bytes)} bytes`),
      ...term("test images right", "not run yet", `${name}-right`)),
    made("table", {}, made("caption", { textContent: "Share of each digit" }), made("tbody", {}, ...rows)));
  section.setAttribute("aria-labelledby", `${name}-title`);
  return section;
}

async function start() {
  digits = await (await fetch("digits.json")).json();
  element("sides").replaceChildren(...NAMES.map((name) => side(name, digits.networks[name])));
  listenToPad();
  listSamples();
  try {
    ort = await import("./ort/ort.wasm.min.mjs");
  } catch {
    throw new Error("onnxruntime-web is not beside this page; docs/demo/fetch.py puts it there.");
  }
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  const loaded = {};
  for (const name of NAMES) {
    loaded[name] = await ort.InferenceSession.create(`${name}.onnx`, { executionProviders: ["wasm"] });
  }
  sessions = loaded;
  for (const id of ["more", "all", "measure"]) element(id).disabled = false;
  element("more").addEventListener("click", listSamples);
  element("all").addEventListener("click", () => inTurn(runAll));
  element("measure").addEventListener("click", () => inTurn(measure));
  await showSample(0);
  await inTurn(measure);
  document.documentElement.dataset.ready = "yes";
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawPad(); if (digits) { first -= 1; listSamples(); } });
start().catch(fail);
