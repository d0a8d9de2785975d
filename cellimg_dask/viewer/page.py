"""The page on which one sees what a server does."""

from __future__ import annotations

__all__ = ["PAGE"]

# It needs nothing from elsewhere, and writes all that comes from the server as text.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>cellimg</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin-top: 1.6em; }
table { border-collapse: collapse; }
th, td { padding: .2em .9em .2em 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.bar { display: inline-block; width: 12em; height: .8em; background: #eee; text-align: left; }
.bar span { display: inline-block; height: 100%; vertical-align: top; }
.cached { background: #3a7; } .computing { background: #38c; } .failed { background: #c33; }
pre { background: #f6f6f6; padding: .6em; white-space: pre-wrap; }
#gone { color: #c33; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } th, td { border-color: #333; }
  .bar { background: #333; } pre { background: #222; } a { color: #8bf; }
}
</style>
</head>
<body>
<h1>cellimg <span id="gone"></span></h1>
<p id="summary"></p>
<table><thead><tr>
<th>layer</th><th>shape</th><th>dtype</th><th>cells</th><th></th><th>cached</th><th>computing</th>
<th>waiting</th><th>failed</th><th>hits/s</th><th>misses/s</th><th>loads/s</th><th>links</th>
</tr></thead><tbody id="layers"></tbody></table>
<h2>Errors</h2>
<div id="errors"></div>
<script>
"use strict";
const base = "@BASE@";
const byId = id => document.getElementById(id);
const number = n => n.toLocaleString("en");
let before = null;
function cell(row, text) {
  const made = row.insertCell();
  made.textContent = text;
  return made;
}
function link(place, text, address) {
  const made = document.createElement("a");
  made.textContent = text;
  made.href = address;
  place.append(made, " ");
}
function rate(now, name, place) {
  if (!before) return "";
  const [layer, level] = place;
  const old = before.layers.find(each => each.name === layer);
  if (!old || !old.levels[level]) return "";
  const seconds = before.time < now.time ? now.time - before.time : 1;
  const mine = now.layers.find(each => each.name === layer).levels[level];
  return number(Math.round((mine[name] - old.levels[level][name]) / seconds));
}
function show(now) {
  const asked = now.requests;
  byId("summary").textContent =
    `${number(asked.open)} open requests, ${number(asked.chunks)} chunks sent ` +
    `(${number(Math.round(asked.bytes / 1048576))} MiB), ${number(asked.cancelled)} cancelled, ` +
    `${number(asked.refused)} refused, ${number(asked.errors)} failed; cache: ${now.cache.text}`;
  const table = byId("layers");
  table.replaceChildren();
  for (const layer of now.layers) {
    layer.levels.forEach((level, index) => {
      const row = table.insertRow();
      cell(row, layer.levels.length > 1 ? `${layer.name} / ${index}` : layer.name);
      cell(row, level.shape.join(" × "));
      cell(row, index ? "" : layer.dtype);
      cell(row, number(level.cells));
      const bar = document.createElement("span");
      bar.className = "bar";
      for (const state of ["cached", "computing", "failed"]) {
        const part = document.createElement("span");
        part.className = state;
        part.style.width = `${100 * level[state] / Math.max(1, level.cells)}%`;
        bar.append(part);
      }
      cell(row, "").append(bar);
      for (const state of ["cached", "computing", "waiting", "failed"])
        cell(row, number(level[state]));
      for (const name of ["hits", "misses", "loads"])
        cell(row, rate(now, name, [layer.name, index]));
      const links = cell(row, ""), name = encodeURIComponent(layer.name);
      if (!index) {
        link(links, "0.5", `${base}/${name}/zarr.json`);
        link(links, "0.4", `${base}/@0.4/${name}/.zattrs`);
      }
    });
  }
  const errors = byId("errors");
  errors.replaceChildren();
  if (!now.errors.length) errors.textContent = "none";
  for (const error of now.errors) {
    const made = document.createElement("pre");
    const when = new Date(1000 * error.time).toLocaleTimeString();
    made.textContent = `${when}  ${error.layer}: ${error.text}`;
    errors.append(made);
  }
  before = now;
}
async function refresh() {
  try {
    const answer = await fetch(`${base}/@status.json`, {cache: "no-store"});
    show(await answer.json());
    byId("gone").textContent = "";
  } catch (error) {
    byId("gone").textContent = "does not answer";
  }
  setTimeout(refresh, 1000);
}
refresh();
</script>
</body>
</html>
"""
