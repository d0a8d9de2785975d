"""The page on which one sees what a server does."""

from __future__ import annotations

__all__ = ["PAGE"]

# It needs nothing from elsewhere, and writes all that comes from the server as text.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>cellimg</title>
<style>
:root {
  color-scheme: light dark; --text: #222; --back: #fff; --faint: #667; --line: #ddd; --fill: #eee;
  --cached: #2a9d63; --computing: #e5a50a; --waiting: #3b82d6; --failed: #d33b3b;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #181818; --faint: #99a; --line: #333; --fill: #303030; }
  a { color: #8bf; }
}
body {
  font: 14px/1.5 system-ui, sans-serif; margin: 1.5em; color: var(--text);
  background: var(--back); font-variant-numeric: tabular-nums;
}
h1 { font-size: 1.3em; margin: 0 0 .6em; } h2 { font-size: 1.05em; margin: 1.8em 0 .4em; }
#gone { color: var(--failed); font-weight: normal; }
.old { opacity: .45; }
dl { display: flex; flex-wrap: wrap; gap: .4em 2.2em; margin: 0 0 1.4em; }
dt { color: var(--faint); font-size: .85em; } dd { margin: 0; font-size: 1.15em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th { font-weight: normal; color: var(--faint); font-size: .85em; }
th, td {
  padding: .25em 1em .25em 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: middle;
}
th.left, td.left { text-align: left; }
td.name { max-width: 22em; overflow: hidden; text-overflow: ellipsis; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 0; }
#errors td { vertical-align: top; }
.faint { color: var(--faint); }
.bar { display: flex; width: 9em; height: .8em; background: var(--fill); }
.bar span { flex: none; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
.cached { background: var(--cached); } .computing { background: var(--computing); }
.waiting { background: var(--waiting); } .failed { background: var(--failed); }
</style>
</head>
<body>
<h1>cellimg <span id="gone"></span></h1>
<noscript>This page needs JavaScript; the numbers are at @BASE@/@status.json</noscript>
<div id="all">
<dl id="summary"></dl>
<div class="wide"><table><thead><tr>
<th class="left">layer</th><th>cells</th><th></th>
<th><span class="key cached"></span>in memory</th>
<th><span class="key computing"></span>computing</th>
<th><span class="key waiting"></span>waiting</th>
<th><span class="key failed"></span>failed</th>
<th>computed/s</th><th>time/cell</th><th>dtype</th><th>shape</th><th>of a cell</th>
<th class="left">metadata</th>
</tr></thead><tbody id="layers"></tbody></table></div>
<h2>Errors</h2>
<p class="faint" id="many"></p>
<table id="errors"></table>
</div>
<script>
"use strict";
const base = "@BASE@";
const byId = id => document.getElementById(id);
const number = n => n.toLocaleString("en");
const short = n => n === 0 ? "0" : n < 10 ? n.toPrecision(2) : number(Math.round(n));
let before = null, answered = Date.now();
function cell(row, text, kind) {
  const made = row.insertCell();
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function link(place, text, address) {
  const made = document.createElement("a");
  made.textContent = text;
  made.href = address;
  place.append(made, " ");
}
function size(bytes) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (bytes < 1024) return `${short(bytes)} ${unit}`;
    bytes /= 1024;
  }
  return `${short(bytes)} TiB`;
}
const duration = s => s < 1 ? `${short(1000 * s)} ms` : `${short(s)} s`;
function rate(now, get) {
  if (!before || before.time >= now.time) return null;
  const old = get(before);
  return old === undefined ? null : Math.max(0, get(now) - old) / (now.time - before.time);
}
function fact(name, text) {
  const place = byId("summary"), pair = document.createElement("div");
  const what = document.createElement("dt"), value = document.createElement("dd");
  what.textContent = name;
  value.textContent = text;
  pair.append(what, value);
  place.append(pair);
}
function showSummary(now) {
  const asked = now.requests;
  byId("summary").replaceChildren();
  fact("requests that wait", number(asked.open));
  const sent = rate(now, each => each.requests.bytes);
  fact("sent", `${number(asked.chunks)} chunks, ${size(asked.bytes)}` +
    (sent === null ? "" : `, ${size(sent)}/s`));
  fact("cache", now.cache.text);
  fact("given up by readers", number(asked.cancelled));
  fact("refused, too many", number(asked.refused));
  fact("failed", number(asked.errors));
}
function showLevel(table, layer, level, index, now) {
  const row = table.insertRow();
  const name = cell(row, layer.name, "left name");
  name.title = layer.name;
  if (layer.levels.length > 1) name.textContent += `, level ${index}`;
  cell(row, number(level.cells));
  if (level.only_reads) {
    const said = cell(row, "read, not computed", "left faint");
    said.colSpan = 2;
    cell(row, "");
  } else {
    const bar = document.createElement("div");
    bar.className = "bar";
    for (const state of ["cached", "computing", "waiting", "failed"]) {
      if (!level[state]) continue;
      const part = document.createElement("span");
      part.className = state;
      // However few there are, they are seen.
      part.style.width = `max(2px, ${100 * level[state] / Math.max(1, level.cells)}%)`;
      part.title = `${number(level[state])} ${state}`;
      bar.append(part);
    }
    cell(row, "").append(bar);
    cell(row, number(level.cached));
    cell(row, number(level.computing));
  }
  cell(row, number(level.waiting));
  cell(row, number(level.failed));
  const speed = rate(now, each => {
    const known = each.layers.find(other => other.name === layer.name);
    return known?.levels[index]?.loads;
  });
  cell(row, speed === null ? "" : short(speed));
  cell(row, level.loads ? duration(level.load_seconds / level.loads) : "");
  cell(row, index ? "" : layer.dtype);
  cell(row, level.shape.join(" \u00d7 ") || "one voxel");
  cell(row, level.cell_shape.join(" \u00d7 "));
  const links = cell(row, "", "left"), address = encodeURIComponent(layer.name);
  if (!index) {
    link(links, "zarr 3", `${base}/${address}/zarr.json`);
    link(links, "zarr 2", `${base}/@0.4/${address}/.zattrs`);
  }
}
function showErrors(now) {
  const table = byId("errors");
  table.replaceChildren();
  const total = now.requests.errors, shown = now.errors.length;
  byId("many").textContent =
    !shown ? "none" : total > shown ? `the last ${shown} of ${number(total)}` : "";
  for (const error of now.errors) {
    const row = table.insertRow();
    cell(row, new Date(1000 * error.time).toLocaleTimeString("en-GB"), "left faint");
    cell(row, error.layer, "left name");
    cell(row, error.text, "left text");
  }
}
function show(now) {
  showSummary(now);
  const table = byId("layers");
  table.replaceChildren();
  for (const layer of now.layers)
    layer.levels.forEach((level, index) => showLevel(table, layer, level, index, now));
  showErrors(now);
  before = now;
}
async function refresh() {
  if (!document.hidden) {
    try {
      const answer = await fetch(`${base}/@status.json`, {
        cache: "no-store", signal: AbortSignal.timeout(10000),
      });
      if (!answer.ok) throw new Error(answer.status);
      show(await answer.json());
      answered = Date.now();
      byId("gone").textContent = "";
      byId("all").className = "";
    } catch (error) {
      const seconds = Math.round((Date.now() - answered) / 1000);
      byId("gone").textContent = `does not answer (for ${seconds} s); what follows is old`;
      byId("all").className = "old";
    }
  }
  setTimeout(refresh, 1000);
}
document.addEventListener("visibilitychange", () => { before = null; });
refresh();
</script>
</body>
</html>
"""
