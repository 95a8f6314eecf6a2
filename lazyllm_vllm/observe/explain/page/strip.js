// The whole prompt as a strip: a row for each stage after the first, darker where more of the
// tokens there have keys; below it ticks for revived tokens, above it ticks for what was found.

const strip = (() => {
  const canvas = document.getElementById("strip");
  const ROW = 9, TICKS = 7;
  const rows = Math.max(story.stages - 1, 1);
  canvas.title = "a row a stage, darker where more is kept; below: revived; above: found. Click to go there";
  const height = 2 * TICKS + rows * (ROW + 1);
  let waits = false;

  function draw() {
    waits = false;
    const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
    if (!width) return;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d"), style = getComputedStyle(canvas);
    pen.scale(scale, scale);
    const ink = style.color;
    const x = (position) => (position / story.size) * width;
    const edge = (position) => Math.round(x(position) * scale) / scale; // of a pixel: no seams
    const depth = story.depths(now.step), chosen = story.chosenAt(now.step);
    const columns = Math.min(Math.ceil(width), story.size);
    pen.fillStyle = ink;
    for (let column = 0; column < columns; column++) {
      const first = Math.floor((column / columns) * story.size);
      const end = Math.max(Math.floor(((column + 1) / columns) * story.size), first + 1);
      for (let row = 0; row < rows; row++) {
        let there = 0;
        for (let i = first; i < end; i++) {
          there += (now.view === "chosen" ? chosen[i] : depth[i] - 1) >= (story.stages > 1 ? row + 1 : 0);
        }
        const isOther = now.stage !== 0 && now.stage !== row + 1;
        pen.globalAlpha = (there / (end - first)) * (isOther ? 0.25 : 0.85);
        pen.fillRect(edge(first), TICKS + row * (ROW + 1), edge(end) - edge(first), ROW);
      }
    }
    pen.globalAlpha = 1;
    for (const { first } of now.matches) pen.fillRect(x(first), 0, 1.5, TICKS - 2);
    for (const one of story.revivals) {
      if (one.step > now.step || (now.stage && one.stage !== now.stage)) continue;
      const isNow = one.step === now.step;
      pen.fillRect(x(one.position) - (isNow ? 1 : 0), height - TICKS + 1, isNow ? 3 : 1.5, isNow ? TICKS : TICKS - 3);
    }
    pen.strokeStyle = ink;
    const [head, tail] = prompt.visible();
    pen.strokeRect(x(head) + 0.5, TICKS - 1.5, Math.max(x(tail) - x(head) - 1, 3), rows * (ROW + 1) + 2);
    if (now.cursor !== null) pen.fillRect(x(now.cursor) - 1, 0, 2, height);
  }

  // Soon, and once for many calls.
  function refresh() {
    if (!waits) requestAnimationFrame(draw);
    waits = true;
  }

  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    goTo(Math.min(Math.floor(share * story.size), story.size - 1));
  });
  window.addEventListener("scroll", refresh, { passive: true });
  window.addEventListener("resize", refresh);
  return { refresh };
})();
