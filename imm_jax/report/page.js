// The browser of answers, and the page's look for a newer one.
// What a model wrote is only ever put into the page as text (textContent), never as HTML.
"use strict";
(() => {
  const PAGE = 25;
  const SLICE = 20000;  // rows that are searched before the browser may draw again
  const byId = (id) => document.getElementById(id);
  const rows = [];  // of all files: [question, sample, temperature, right, cut, span, text, chunk]
  let found = [];
  let first = 0;
  let run = 0;  // a newer search ends an older one
  let loading = null;

  function unpack(script) {
    const text = atob(script.textContent);
    script.textContent = "";
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  async function load() {
    if (typeof DecompressionStream === "undefined") {
      byId("found").textContent = "This browser cannot unpack the answers (it has no DecompressionStream).";
      return;
    }
    const scripts = [...document.querySelectorAll("script.chunk")];
    const chunks = [];
    let next = unpack(scripts[0]);
    for (let i = 0; i < scripts.length; i++) {
      byId("found").textContent = `Unpacking: ${rows.length.toLocaleString("en")} answers so far.`;
      const chunk = await next;
      if (i + 1 < scripts.length) next = unpack(scripts[i + 1]);  // while this one is taken in
      for (const row of chunk.rows) {
        row.push(chunk);
        rows.push(row);
      }
      delete chunk.rows;
      chunks.push(chunk);
    }
    const roundName = (round) => (round < 0 ? "base" : String(round));
    options("run", chunks.map((chunk) => chunk.run));
    byId("filter-run").parentElement.hidden = new Set(chunks.map((chunk) => chunk.run)).size < 2;
    options("kind", chunks.map((chunk) => chunk.kind));
    options("round", [...new Set(chunks.map((chunk) => chunk.round))].sort((a, b) => a - b).map(roundName));
    options("task", chunks.map((chunk) => chunk.task));
    options("verdict", ["right", "wrong", "no answer", "cut off"]);
    await search();
  }

  function options(name, values) {
    const select = byId(`filter-${name}`);
    select.replaceChildren(...[select.dataset.all, ...new Set(values)].map((value, i) => {
      const option = document.createElement("option");
      option.value = i ? value : "";
      option.textContent = value;
      return option;
    }));
  }

  const verdict = (row) => (row[3] ? "right" : row[5] ? "wrong" : "no answer");

  // What the filters ask for, as a function of a row.
  function wanted() {
    const [runName, kind, round, task, asked] =
        ["run", "kind", "round", "task", "verdict"].map((name) => byId(`filter-${name}`).value);
    const text = byId("query").value.trim();
    const pattern = text && new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu");
    const chunks = new Map();  // whether a file's rows are wanted, and which of its questions hold the text
    const look = (chunk) => {
      const fits = (!runName || chunk.run === runName) && (!kind || chunk.kind === kind) &&
          (!task || chunk.task === task) && (!round || chunk.round === (round === "base" ? -1 : Number(round)));
      const hits = fits && pattern && chunk.questions.map((question) => pattern.test(question[1]));
      chunks.set(chunk, {fits, hits});
      return chunks.get(chunk);
    };
    return (row) => {
      const {fits, hits} = chunks.get(row[7]) || look(row[7]);
      return fits && (!asked || (asked === "cut off" ? row[4] === 1 : verdict(row) === asked)) &&
          (!pattern || hits[row[0]] || pattern.test(row[6]) || pattern.test(row[5]));
    };
  }

  async function search() {
    const mine = ++run;
    const fits = wanted();
    const hits = [];
    for (let start = 0; start < rows.length; start += SLICE) {
      const end = Math.min(start + SLICE, rows.length);
      for (let i = start; i < end; i++) if (fits(rows[i])) hits.push(rows[i]);
      if (end < rows.length) await new Promise((resolve) => setTimeout(resolve));
      if (mine !== run) return;
    }
    found = hits;
    first = 0;
    show();
  }

  function part(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function item(row) {
    const [question, sample, temperature, right, cut, span, text, chunk] = row;
    const [id, asked, gold] = chunk.questions[question];
    const facts = part("div", "facts");
    const add = (name, value) => {
      const fact = part("span", "", `${name} `);
      fact.append(part("bdi", "", value));
      facts.append(fact);
    };
    facts.append(part("span", "verdict", verdict(row) + (cut ? ", cut off" : "")));
    add("extracted", span || "nothing");
    add("gold", gold);
    if (chunk.run) add("run", chunk.run);
    add("", chunk.round < 0 ? "base" : `round ${chunk.round}`);
    add("", chunk.kind);
    add("task", chunk.task);
    if (temperature !== null) add("temperature", temperature);
    if (sample !== null) add("sample", sample);
    add("id", id);
    const entry = part("li", right ? "right" : "");
    entry.append(facts, part("div", "question", asked), part("div", "answer", text));
    return entry;
  }

  function show() {
    const last = Math.min(first + PAGE, found.length);
    const number = (n) => n.toLocaleString("en");
    byId("found").textContent = found.length
        ? `${number(first + 1)} to ${number(last)} of ${number(found.length)} found, ${number(rows.length)} in all`
        : `none found, ${number(rows.length)} in all`;
    byId("list").replaceChildren(...found.slice(first, last).map(item));
    byId("previous").disabled = first === 0;
    byId("next").disabled = last >= found.length;
    byId("save").disabled = found.length === 0;
  }

  function turn(step) {
    reading = true;
    first += step * PAGE;
    show();
    byId("filters").scrollIntoView();
  }

  function save() {
    const lines = found.map(([question, sample, temperature, right, cut, span, text, chunk]) => {
      const [id, asked, gold] = chunk.questions[question];
      return JSON.stringify({id, run: chunk.run || undefined, round: chunk.round, from: chunk.kind, task: chunk.task, sample, temperature,
                             question: asked, gold, text, span, correct: right === 1, cut_off: cut === 1}) + "\n";
    });
    const link = part("a");
    link.href = URL.createObjectURL(new Blob(lines, {type: "application/x-ndjson"}));
    link.download = "answers.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  let reading = false;
  const section = byId("samples");
  if (section) {
    const begin = () => loading || (loading = load());
    const read = () => { reading = true; return begin(); };
    let waiting = 0;
    const later = () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => read().then(search), 150);
    };
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("input", later);
    byId("filters").addEventListener("change", later);  // all that some assistive technology sends
    byId("filters").addEventListener("focusin", read);
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    byId("save").addEventListener("click", save);
    const watch = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        // On a high screen the answers are in view before anyone has scrolled to them.
        if (window.scrollY > 0) {
          watch.disconnect();
          reading = true;
        }
        begin();
      }
    }, {rootMargin: "300px"});
    watch.observe(section);
  }

  // A run that goes on writes this file again. Who reads answers is not disturbed; the place on the page is kept.
  const seconds = Number(document.body.dataset.reload);
  if (seconds) {
    setInterval(() => {
      if (!reading && !document.hidden && !document.querySelector("details[open]")) location.reload();
    }, 1000 * seconds);
  }
})();
