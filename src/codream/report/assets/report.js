"use strict";
// The page is complete without this script; it adds values under the pointer and the player of episodes.
(() => {
  document.documentElement.classList.add("scripted");
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((node) => { node.open = true; }));
  const NS = "http://www.w3.org/2000/svg";
  const make = (name, attributes = {}, parent = null, text = null) => {
    const node = document.createElementNS(NS, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== null) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const html = (name, attributes = {}, parent = null, text = null) => {
    const node = document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== null) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const number = (v) => (Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4)));

  // ---------------------------------------------------------------- values under the pointer
  function enhance(svg) {
    const data = JSON.parse(svg.dataset.chart);
    const [left, top, right, bottom] = data.box;
    const holder = svg.parentElement;
    if (getComputedStyle(holder).position === "static") holder.style.position = "relative";
    let cursor = null, tip = null, at = null;
    const points = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const toX = (v) => left + ((v - data.x[0]) / (data.x[1] - data.x[0] || 1)) * (right - left);
    const show = (x) => {
      at = points.reduce((best, p) => (Math.abs(p - x) < Math.abs(best - x) ? p : best), points[0]);
      cursor = cursor || make("path", { class: "cursor" }, svg);
      cursor.setAttribute("d", `M${toX(at)} ${top}V${bottom}`);
      tip = tip || html("div", { class: "tip" }, holder);
      tip.replaceChildren();
      html("div", {}, tip, `${data.x_label}: ${number(at)}`);
      for (const line of data.lines) {
        let k = line.x.reduce((best, v, i) => (Math.abs(v - at) < Math.abs(line.x[best] - at) ? i : best), 0);
        const row = html("div", {}, tip);
        html("i", { style: `background:${line.colour}` }, row);
        row.append(`${line.name}: ${number(line.y[k])}`);
      }
      const box = svg.getBoundingClientRect(), outer = holder.getBoundingClientRect();
      const x0 = box.left - outer.left + (toX(at) / svg.viewBox.baseVal.width) * box.width;
      const wide = tip.offsetWidth;
      tip.style.left = `${Math.max(0, x0 + 12 + wide > outer.width ? x0 - wide - 12 : x0 + 12)}px`;
      tip.style.top = `${box.top - outer.top + 8}px`;
    };
    const hide = () => { if (cursor) cursor.remove(); if (tip) tip.remove(); cursor = tip = null; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      show(data.x[0] + ((x - left) / (right - left)) * (data.x[1] - data.x[0]));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const k = at === null ? 0 : points.indexOf(at) + move;
      show(points[Math.min(Math.max(k, 0), points.length - 1)]);
    });
  }
  document.querySelectorAll("svg[data-chart]").forEach(enhance);

  // ---------------------------------------------------------------- an episode and its dream
  const source = document.getElementById("scenes");
  const player = document.getElementById("player");
  if (!source || !player) return;
  const { scenes, agents, actions, counts } = JSON.parse(source.textContent);
  const part = (name) => player.querySelector(`[data-part="${name}"]`);
  const state = { scene: 0, focal: 0, step: 0, timer: null };
  const select = (name, labels, change) => {
    const node = part(name);
    labels.forEach((label, k) => html("option", { value: k }, node, label));
    node.addEventListener("change", () => { change(+node.value); draw(true); });
    return node;
  };
  const scene = () => scenes[state.scene];
  const view = () => scene().views[state.focal];
  select("focal", agents, (k) => { state.focal = k; });
  part("episode").parentElement.hidden = scenes.length < 2;
  select("episode", scenes.map((one) => one.label), (k) => { state.scene = k; state.step = Math.min(state.step, scene().steps); });
  const slider = part("slider");
  const go = (step) => { state.step = Math.min(Math.max(step, 0), scene().steps); draw(false); };
  const pause = () => { clearInterval(state.timer); state.timer = null; part("play").textContent = "▶ play"; };
  const play = () => {
    if (state.step >= scene().steps) state.step = 0;
    part("play").textContent = "⏸ pause";
    state.timer = setInterval(() => { if (state.step >= scene().steps) pause(); else go(state.step + 1); }, 350);
  };
  part("play").addEventListener("click", () => (state.timer ? pause() : play()));
  part("back").addEventListener("click", () => { pause(); go(state.step - 1); });
  part("next").addEventListener("click", () => { pause(); go(state.step + 1); });
  slider.addEventListener("input", () => { pause(); go(+slider.value); });

  const SIZE = 320;
  function frame(svg) {
    svg.setAttribute("class", "arena");
    const far = scene().views.flatMap((v) => [...v.real.flat(2).map(Math.abs), ...(v.dream || []).flat(2).map((x) => Math.min(Math.abs(x), 1.5))]);
    const half = Math.min(Math.max(1.05, ...far) * 1.08, 3);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${SIZE} ${SIZE}`);
    const to = (v) => ((v + half) / (2 * half)) * SIZE;
    const scale = SIZE / (2 * half);
    if (!scene().centred) make("rect", { class: "wall", x: to(-1), y: to(-1), width: 2 * scale, height: 2 * scale }, svg);
    return { to, flip: (v) => SIZE - to(v), scale };
  }
  function bodies(svg, paper, positions, style, small = 0) {
    positions.forEach(([x, y], i) => {
      const r = Math.max(scene().radii.agents[i] * paper.scale, 4) + small;
      make("circle", { cx: paper.to(x), cy: paper.flip(y), r, ...style(i) }, svg);
    });
  }
  function plane(real, dream) {
    const t = state.step, v = view(), begun = t > scene().start;
    let paper = frame(real);
    const rocks = (svg, marks) => marks.forEach(([x, y]) =>
      make("circle", { class: "rock", cx: paper.to(x), cy: paper.flip(y), r: scene().radii.landmark * paper.scale }, svg));
    const eye = (svg, [x, y]) => make("circle", { class: "eye", cx: paper.to(x), cy: paper.flip(y), r: scene().radii.agents[state.focal] * paper.scale + 6 }, svg);
    rocks(real, v.marks[t]);
    bodies(real, paper, v.real[t], (i) => ({ style: `fill:var(--a${i})` }));
    eye(real, v.real[t][state.focal]);
    if (!v.dream) return;
    paper = frame(dream);
    rocks(dream, v.dream_marks[t]);
    if (begun) {
      for (const ghost of v.ghosts) bodies(dream, paper, ghost[t - scene().start - 1], (i) => ({ class: "ghost", style: `fill:var(--a${i})` }), -2);
      v.real[t].forEach(([x, y], i) => {
        const [a, b] = v.dream[t][i];
        make("path", { class: "gap", d: `M${paper.to(x)} ${paper.flip(y)}L${paper.to(a)} ${paper.flip(b)}` }, dream);
        make("circle", { cx: paper.to(x), cy: paper.flip(y), r: 2.5, style: `fill:var(--a${i})` }, dream);
      });
    }
    const style = begun ? (i) => ({ class: "dreamt", style: `stroke:var(--a${i})` }) : (i) => ({ style: `fill:var(--a${i});opacity:.5` });
    bodies(dream, paper, v.dream[t], style, begun ? 1 : 0);
    eye(dream, v.dream[t][state.focal]);
  }
  function film(real, dream) {
    const edge = view().edge || 0;
    for (const [svg, what] of [[real, "real"], [dream, "dream"]]) {
      if (!view()[what]) continue;
      if (svg.dataset.of !== `${state.scene}/${state.focal}`) {
        svg.dataset.of = `${state.scene}/${state.focal}`;
        svg.setAttribute("class", "film");
        svg.setAttribute("viewBox", "0 0 1 1");
        svg.replaceChildren();
        const cut = make("svg", { width: 1, height: 1 }, svg);
        make("image", { href: view()[what], x: 0, y: 0, width: scene().steps + 1, height: 1, preserveAspectRatio: "none" }, cut);
      }
      svg.firstChild.setAttribute("viewBox", `${state.step + edge} ${edge} ${1 - 2 * edge} ${1 - 2 * edge}`);
    }
  }
  // Each entry of the observation over the whole episode; where there is a dream, over what happened.
  function curves() {
    const v = view(), holder = part("curves"), start = scene().start, steps = scene().steps, t = state.step;
    const [w, h, left, top, bottom] = [220, 96, 6, 20, 8];
    holder.replaceChildren();
    v.entries.forEach((entry, k) => {
      const [low, high] = v.span[k];
      const x = (s) => left + (s / Math.max(steps, 1)) * (w - 2 * left);
      const y = (value) => top + Math.min(Math.max((high - value) / (high - low), 0), 1) * (h - top - bottom);
      const path = (rows, begin) => rows.map((row, s) => `${x(begin + s).toFixed(1)} ${y(row[k]).toFixed(1)}`);
      const svg = make("svg", { class: "curve", viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": `entry ${entry}` }, holder);
      make("rect", { class: "cell", x: left, y: top, width: w - 2 * left, height: h - top - bottom }, svg);
      const colour = `var(--a${state.focal})`, dreaming = v.dream && t > start;
      if (v.dream) {
        make("path", { class: "band", style: `fill:${colour}`, d: `M${[...path(v.high, start), ...path(v.low, start).reverse()].join("L")}Z` }, svg);
        make("path", { class: "since", d: `M${x(start)} ${top}V${h - bottom}` }, svg);
      }
      make("path", { class: "line", d: `M${path(v.real, 0).join("L")}` }, svg);
      if (v.dream) make("path", { class: "line imagined", style: `stroke:${colour}`, d: `M${path(v.dream.slice(start), start).join("L")}` }, svg);
      make("path", { class: "cursor", d: `M${x(t)} ${top}V${h - bottom}` }, svg);
      make("circle", { class: "now", cx: x(t), cy: y(v.real[t][k]), r: 3 }, svg);
      if (dreaming) make("circle", { cx: x(t), cy: y(v.dream[t][k]), r: 3, style: `fill:${colour}` }, svg);
      make("text", { x: left, y: 13 }, svg, `entry ${entry}`);
      const short = (value) => String(+value.toPrecision(3));
      make("text", { class: "soft", x: w - left, y: 13, "text-anchor": "end" }, svg,
        short(v.real[t][k]) + (dreaming ? ` · imagined ${short(v.dream[t][k])}` : ""));
    });
  }
  function grid(real, dream) {
    const v = view(), cell = SIZE / Math.max(v.width, v.height);
    for (const [svg, what] of [[real, "real"], [dream, "dream"]]) {
      if (!v[what]) continue;
      svg.setAttribute("class", "arena");
      svg.setAttribute("viewBox", `0 0 ${v.width * cell} ${v.height * cell}`);
      svg.replaceChildren();
      v[what][state.step].forEach((sure, c) => {
        const x = (c % v.width) * cell, y = Math.floor(c / v.width) * cell;
        make("rect", { class: "cell", x, y, width: cell, height: cell }, svg);
        v.things.forEach(([kind, agent], k) => {
          if (sure[k] < 0.03) return;
          const mx = x + cell / 2, my = y + cell / 2, r = cell * (kind === "agent" ? 0.3 : 0.17);
          const look = { style: `fill:var(--a${agent});fill-opacity:${sure[k]}` };
          const node = kind === "agent" ? make("circle", { cx: mx, cy: my, r, ...look }, svg)
            : make("path", { class: "coin", d: `M${mx} ${my - r}L${mx + r} ${my}L${mx} ${my + r}L${mx - r} ${my}Z`, ...look }, svg);
          make("title", {}, node, `${kind} of ${agents[agent]}: ${Math.round(sure[k] * 100)} %`);
          if (kind === "agent" && agent === state.focal && sure[k] > 0.4) make("circle", { class: "eye", cx: mx, cy: my, r: r + 6 }, svg);
        });
      });
    }
  }
  function bars(row, probabilities, took, agent) {
    const holder = html("span", { class: "bar" }, row);
    probabilities.slice(0, counts[agent]).forEach((p, a) =>
      html("i", { class: a === took ? "took" : "", title: `${actions[a]}: ${Math.round(p * 100)} %`, style: `height:${Math.max(p * 100, 2)}%;background:var(--a${agent})` }, holder));
    html("br", {}, row);
    const names = html("span", { class: "acts" }, row);
    for (let a = 0; a < counts[agent]; a++) html("span", {}, names, actions[a]);
  }
  function mind() {
    const t = Math.min(state.step, scene().steps - 1), v = view(), table = part("others");
    table.replaceChildren();
    const line = (who, what) => {
      const row = html("tr", {}, table);
      const head = html("th", {}, row, who);
      html("br", {}, head);
      html("small", {}, head, what);
      return html("td", {}, row);
    };
    const took = scene().action[t], here = scene().acting[t], me = state.focal;
    const did = (j) => (here[j] ? `did: ${actions[took[j]]}` : "is not there");
    const mine = line(`${agents[me]} (itself)`, did(me));
    if (here[me]) bars(mine, v.policy[t], took[me], me);
    if (v.others) agents.filter((_, j) => j !== me).forEach((name, k) => {
      const j = agents.indexOf(name);
      const cell = line(name, did(j));
      if (here[me] && here[j]) bars(cell, v.others[t][k], took[j], j);
    });
    const facts = part("facts");
    facts.replaceChildren();
    const dreams = Boolean(v.dream);
    part("bars-title").textContent = !v.others ? "What it would do itself"
      : scene().others === "mirrored" ? "What it would do in each one’s place" : "What it expected each agent to do";
    const fact = (name, value) => { const row = html("tr", {}, facts); html("th", {}, row, name); html("td", {}, row, value); };
    if (dreams) fact("reward it expected for this step", number(v.reward[t]));
    fact(scene().common ? "reward it really got, the sum of all agents’" : "reward it really got", number(scene().reward[t][me]));
    fact("value: the return it expects from here", number(v.value[t]));
    if (!dreams) return;
    fact(`gap (${scene().gap_label})`, state.step > scene().start ? number(v.gap[state.step]) : "– (still watching)");
    fact("the same if nothing had moved", state.step > scene().start ? number(v.still[state.step]) : "–");
  }
  function gaps() {
    if (!view().dream) return;
    const svg = part("gap"), v = view(), w = 440, h = 130, from = scene().start, n = scene().steps;
    svg.replaceChildren();
    const high = Math.max(...v.gap, ...v.still, 1e-6);
    const x = (t) => 44 + (t / n) * (w - 56), y = (e) => h - 36 - (e / high) * (h - 46);
    make("path", { class: "axis", d: `M44 10V${h - 36}H${w - 12}` }, svg);
    const path = (values) => "M" + values.slice(from).map((e, k) => `${x(from + k)} ${y(e)}`).join("L");
    make("path", { class: "line", d: path(v.still), style: "stroke:var(--p6)", "stroke-dasharray": "7 3" }, svg);
    make("path", { class: "line", d: path(v.gap), style: "stroke:var(--p0)" }, svg);
    make("path", { class: "cursor", d: `M${x(state.step)} 10V${h - 36}` }, svg);
    make("text", { x: 40, y: 16, "text-anchor": "end" }, svg, number(high));
    make("text", { x: 40, y: h - 34, "text-anchor": "end" }, svg, "0");
    make("text", { class: "label", x: w / 2, y: h - 4, "text-anchor": "middle" }, svg, "step of the episode");
    make("text", { x: x(from), y: h - 22, "text-anchor": "middle" }, svg, from);
    make("text", { x: x(n), y: h - 22, "text-anchor": "end" }, svg, n);
  }
  function draw() {
    const real = part("real"), dream = part("dream"), t = state.step, start = scene().start;
    slider.max = scene().steps;
    slider.value = t;
    part("clock").textContent = `step ${t} of ${scene().steps}`;
    player.dataset.step = t;
    for (const name of ["dreamed", "gaps"]) part(name).hidden = !view().dream;
    part("seen").textContent = {
      plane: "Ringed: the agent whose dream is shown.", grid: "Ringed: the agent whose dream is shown.",
      image: `As ${agents[state.focal]} sees it.`,
      curves: "" }[scene().kind];
    part("dreamer").textContent = `What ${agents[state.focal]} imagined`;
    part("phase").textContent = t <= start
      ? `It is still watching: from step ${start} on it only imagines.`
      : `${t - start} steps into its dream. ${{
          plane: "Dashed: imagined. Pale: seven other dreams of the same start. Dots: where the bodies really were.",
          grid: "Eight dreams of the same start over one another.",
          image: "One of eight dreams of the same start.", curves: "" }[scene().kind]}`;
    const charted = scene().kind === "curves";
    part("entries").hidden = !charted;
    for (const svg of [real, dream]) svg.toggleAttribute("hidden", charted);
    part("happened").hidden = charted;
    if (charted) {
      const out = view().left_out;
      part("entries-title").textContent = `What ${agents[state.focal]} observes, entry by entry, over the episode`;
      part("entries-told").textContent = (view().dream
        ? `Black: what happened. Dashed: one dream, from step ${start} on; shaded: the range of eight. ` : "")
        + "The line that moves is the step above." + (out ? ` ${out} entries that change less are left out.` : "");
    }
    ({ plane, grid, image: film, curves })[scene().kind](real, dream);
    mind();
    gaps();
  }
  state.step = Math.min(scene().start + 4, scene().steps);
  draw();
})();
