// Runs in neuroglancer's page, after it: paints, and fetches again what has changed.
(() => {
  "use strict";

  const base = window.location.pathname.replace(/[^/]*$/, "");

  const tell = async (message) => {
    const response = await fetch(`${base}@message`, {
      method: "POST",
      body: JSON.stringify(message),
    });
    const reply = await response.json();
    if (!response.ok) throw new Error(reply.error);
    return reply;
  };

  const report = (error) => {
    const box = document.createElement("div");
    box.textContent = `cellimg: ${error.message ?? error}`;
    box.style.cssText =
      "position:fixed;left:8px;bottom:8px;z-index:1000;padding:4px 8px;" +
      "background:#600;color:#fff;font:13px sans-serif;pointer-events:none";
    document.body.append(box);
    setTimeout(() => box.remove(), 6000);
  };

  // ------------------------------------------------------------------ what has changed
  //
  // A zarr source cannot be told that its data have changed. Its chunks are asked for again, all
  // that are visible; most answers are "not modified". What was there before is drawn until the
  // new chunk comes, so that nothing flickers.

  const makeRefresher = (viewer) => {
    const queue = viewer.chunkQueueManager;
    const objects = viewer.chunkManager?.rpc?.objects;
    if (typeof queue?.applyChunkUpdate !== "function" || !(objects instanceof Map)) return null;
    const outdated = new Map(); // Source of chunks -> keys of chunks that are there from before.
    const layers = new Map(); // Name -> {since, next} while its chunks are fetched.

    const apply = queue.applyChunkUpdate;
    queue.applyChunkUpdate = function (update) {
      const source = this.rpc.get(update.source);
      if (source !== undefined && update.promise === undefined && outdated.has(source)) {
        const keys = outdated.get(source);
        if (update.id === undefined) {
          for (const key of source.chunks.keys()) keys.add(key);
          return false;
        }
        if (keys.delete(update.id) && update.new && source.chunks.has(update.id)) {
          source.deleteChunk(update.id);
        } else if (!update.new && !source.chunks.has(update.id)) {
          return false;
        }
      }
      return apply.call(this, update);
    };

    const sourcesOf = (prefix) =>
      [...objects.values()].filter(
        (object) =>
          object.chunks instanceof Map &&
          typeof object.invalidateCache === "function" &&
          String(object.parameters?.url ?? "").startsWith(prefix),
      );

    const isComplete = (names) =>
      viewer.layerManager.managedLayers
        .filter((each) => names.includes(each.name))
        .flatMap((each) => [...(each.layer?.renderLayers ?? [])])
        .every(({ layerChunkProgressInfo: progress }) => {
          if (!progress) return true;
          return progress.numVisibleChunksAvailable >= progress.numVisibleChunksNeeded;
        });

    const finish = (prefix) => {
      for (const source of sourcesOf(prefix)) {
        for (const key of outdated.get(source) ?? []) {
          if (source.chunks.has(key)) source.deleteChunk(key);
        }
        outdated.delete(source);
      }
      queue.visibleChunksChanged.dispatch();
    };

    const begin = (name, { prefix, edition, shown }) => {
      const state = { since: performance.now(), next: null };
      layers.set(name, state);
      for (const source of sourcesOf(prefix)) {
        if (!outdated.has(source)) outdated.set(source, new Set());
        source.invalidateCache();
      }
      const look = () => {
        const elapsed = performance.now() - state.since;
        const done = elapsed > 200 && isComplete(shown);
        if (done) finish(prefix);
        // Whoever goes on painting sees something even where a cell takes long.
        if (done || (state.next !== null && elapsed > 2000)) {
          layers.delete(name);
          if (done) refresher.onDone(name, edition);
          if (state.next !== null) begin(name, state.next);
        } else {
          setTimeout(look, 50);
        }
      };
      setTimeout(look, 50);
    };

    const refresher = {
      // Facts: the prefix of its addresses, its edition, what it is called in the viewer.
      refresh(name, facts) {
        const state = layers.get(name);
        if (state === undefined) begin(name, facts);
        else state.next = facts;
      },
      isBusy: (name) => layers.has(name),
      onDone() {},
    };
    return refresher;
  };

  // ------------------------------------------------------------------ painting

  const panelAt = (viewer, event) => {
    for (const panel of viewer.display.panels) {
      if (panel.sliceView !== undefined && panel.element.contains(event.target)) return panel;
    }
    return undefined;
  };

  // Where the pointer is in the data, in the coordinates that neuroglancer shows above.
  const placeOf = (panel, event) => {
    const bounds = panel.element.getBoundingClientRect();
    const parameters = panel.sliceView.projectionParameters.value;
    const x = event.clientX - bounds.left - panel.element.clientLeft - parameters.logicalWidth / 2;
    const y = event.clientY - bounds.top - panel.element.clientTop - parameters.logicalHeight / 2;
    const matrix = parameters.invViewMatrix;
    const place = Array.from(parameters.globalPosition);
    parameters.displayDimensionRenderInfo.displayDimensionIndices.forEach((dimension, i) => {
      if (dimension >= 0) place[dimension] = matrix[i] * x + matrix[4 + i] * y + matrix[12 + i];
    });
    return place;
  };

  const spaceOf = (viewer) => {
    const { names, scales, units } = viewer.coordinateSpace.value;
    return { names: [...names], scales: Array.from(scales), units: [...units] };
  };

  // Two directions that lie in the plane of a panel, as far as a pixel goes.
  const directionsOf = (panel, rank) => {
    const parameters = panel.sliceView.projectionParameters.value;
    const matrix = parameters.invViewMatrix;
    return [0, 4].map((column) => {
      const direction = new Array(rank).fill(0);
      parameters.displayDimensionRenderInfo.displayDimensionIndices.forEach((dimension, i) => {
        if (dimension >= 0) direction[dimension] = matrix[column + i];
      });
      return direction;
    });
  };

  const pixelsOf = (viewer, panel, length) => {
    const { scales } = spaceOf(viewer);
    const [right] = directionsOf(panel, scales.length);
    return length / Math.hypot(...right.map((step, i) => step * scales[i]));
  };

  const makePainter = (viewer, refresher) => {
    let brush = null;
    let held = false;
    let stroke = null;
    let pointer = null;
    let number = 0;
    const session = Math.random().toString(36).slice(2);

    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.style.cssText =
      "position:fixed;left:0;top:0;width:100vw;height:100vh;z-index:900;pointer-events:none";
    const circle = document.createElementNS(svg.namespaceURI, "circle");
    circle.setAttribute("fill", "none");
    circle.setAttribute("stroke-width", "1.5");
    circle.style.display = "none";
    svg.append(circle);
    document.body.append(svg);

    const draw = () => {
      const panel = held && brush && pointer ? panelAt(viewer, pointer) : undefined;
      circle.style.display = panel ? "" : "none";
      if (!panel) return;
      circle.setAttribute("cx", pointer.clientX);
      circle.setAttribute("cy", pointer.clientY);
      circle.setAttribute("r", Math.max(2, pixelsOf(viewer, panel, brush.radius)));
      circle.setAttribute("stroke", brush.erase ? "#f66" : "#ff0");
    };

    // A trail is shown until the layer shows what was painted.
    const fade = (trail, layer, patience) => {
      if (patience > 0 && refresher?.isBusy(layer)) {
        setTimeout(() => fade(trail, layer, patience - 1), 100);
      } else {
        trail.remove();
      }
    };

    const send = async (each) => {
      if (each.isSending || each.failed) return;
      each.isSending = true;
      try {
        while (each.sent < each.points.length || (each.ended && !each.done)) {
          const points = each.points.slice(each.sent);
          each.sent = each.points.length;
          each.done = each.ended;
          await tell({
            kind: "stroke",
            stroke: each.name,
            points,
            plane: each.plane,
            erase: each.erase,
            end: each.ended,
            space: each.space,
          });
        }
      } catch (error) {
        // All that follows would fail as well.
        each.failed = true;
        each.trail.remove();
        report(error);
      } finally {
        each.isSending = false;
      }
      if (each.done) setTimeout(() => fade(each.trail, brush?.layer, 100), 300);
    };

    const extend = (event) => {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length > 0 ? events : [event]) {
        stroke.points.push(placeOf(stroke.panel, each));
        stroke.path.push(`${each.clientX},${each.clientY}`);
      }
      // A line of no length would not be drawn.
      stroke.trail.setAttribute("points", [stroke.path[0], ...stroke.path].join(" "));
      send(stroke);
    };

    const onDown = (event) => {
      if (!held || !brush || stroke || (event.button !== 0 && event.button !== 2)) return;
      const panel = panelAt(viewer, event);
      if (panel === undefined) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      const space = spaceOf(viewer);
      const erase = brush.erase || event.button === 2;
      const trail = document.createElementNS(svg.namespaceURI, "polyline");
      trail.setAttribute("fill", "none");
      trail.setAttribute("stroke", erase ? "#f66" : "#ff0");
      trail.setAttribute("stroke-opacity", "0.4");
      trail.setAttribute("stroke-linecap", "round");
      trail.setAttribute("stroke-linejoin", "round");
      trail.setAttribute("stroke-width", Math.max(1, 2 * pixelsOf(viewer, panel, brush.radius)));
      svg.append(trail);
      stroke = {
        name: `${session}-${++number}`,
        panel,
        space,
        erase,
        trail,
        plane: directionsOf(panel, space.names.length),
        points: [],
        path: [],
        sent: 0,
        ended: false,
        done: false,
        isSending: false,
      };
      extend(event);
    };

    const onMove = (event) => {
      pointer = event;
      if (stroke) {
        event.stopImmediatePropagation();
        extend(event);
      }
      draw();
    };

    const end = () => {
      if (!stroke) return;
      stroke.ended = true;
      send(stroke);
      stroke = null;
    };

    const swallow = (event) => {
      if (!stroke && !(held && brush && panelAt(viewer, event))) return;
      event.preventDefault();
      event.stopImmediatePropagation();
    };

    const isTyping = (event) =>
      event.target instanceof Element &&
      event.target.closest("input, textarea, select, [contenteditable]") !== null;

    const onKey = (event) => {
      if (!brush || isTyping(event)) return;
      const control = event.ctrlKey || event.metaKey;
      const asked = (() => {
        if (control && event.code === "KeyZ") return event.shiftKey ? "redo" : "undo";
        if (control && event.code === "KeyY") return "redo";
        if (control || event.altKey || event.shiftKey) return null;
        if (event.code === "BracketLeft") return "smaller";
        if (event.code === "BracketRight") return "larger";
        return event.code === "KeyP" ? "hold" : null;
      })();
      if (asked === null) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      if (asked === "hold") {
        held = true;
        draw();
      } else {
        tell({ kind: asked }).catch(report);
      }
    };

    const release = () => {
      held = false;
      draw();
    };

    window.addEventListener("pointerdown", onDown, true);
    window.addEventListener("pointermove", onMove, true);
    window.addEventListener("pointerup", end, true);
    window.addEventListener("pointercancel", end, true);
    for (const kind of ["mousedown", "mouseup", "click", "contextmenu"]) {
      window.addEventListener(kind, swallow, true);
    }
    window.addEventListener("keydown", onKey, true);
    window.addEventListener("keyup", (event) => event.code === "KeyP" && release(), true);
    window.addEventListener("blur", () => {
      end();
      release();
    });

    const painter = {
      set(next) {
        brush = next;
        draw();
      },
    };
    return painter;
  };

  // ------------------------------------------------------------------ what we are told

  const editionsOf = (facts) =>
    Object.fromEntries(
      Object.entries(facts.layers ?? {}).map(([name, { edition }]) => [name, edition]),
    );

  const start = (viewer) => {
    let known = editionsOf(window.cellimgFacts ?? {});
    let layers = window.cellimgFacts?.layers ?? {};
    const told = { ...known };
    const refresher = makeRefresher(viewer);
    const painter = makePainter(viewer, refresher);
    if (refresher === null) {
      tell({ kind: "cannot refresh" }).catch(report);
    } else {
      refresher.onDone = (name, edition) => {
        if (told[name] === edition) return;
        told[name] = edition;
        tell({ kind: "shown", layers: { [name]: edition } }).catch(report);
      };
    }
    tell({ kind: "shown", layers: known }).catch(report);
    // What changes without anybody saying so: which cells are there and which are computed.
    setInterval(() => {
      for (const [name, facts] of Object.entries(layers)) {
        if (facts.changes && refresher?.isBusy(name) === false) refresher.refresh(name, facts);
      }
    }, 1000);
    const listen = () => {
      const facts = new EventSource(`${base}@facts`);
      facts.onmessage = (event) => {
        const now = JSON.parse(event.data);
        painter.set(now.brush ?? null);
        for (const [name, facts] of Object.entries(now.layers ?? {})) {
          if (known[name] !== facts.edition) refresher?.refresh(name, facts);
        }
        known = editionsOf(now);
        layers = now.layers ?? {};
      };
      facts.onerror = () => {
        // A browser gives up where the connection is refused.
        if (facts.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
      };
    };
    listen();
    // Where a label is that is about to be selected, so that it need not be looked for.
    window.addEventListener(
      "dblclick",
      (event) => {
        const panel = panelAt(viewer, event);
        if (panel === undefined) return;
        const place = placeOf(panel, event);
        tell({ kind: "picked", place, space: spaceOf(viewer) }).catch(report);
      },
      true,
    );
    window.cellimg = { refresher, painter };
  };

  const whenThere = () => {
    if (window.viewer === undefined) setTimeout(whenThere, 20);
    else start(window.viewer);
  };
  whenThere();
})();
