// Volumes to scroll through, by NiiVue. Its text and the volumes lie in the page, compressed.
{
  const at = id => document.getElementById(id);
  const HEADER = 352; // bytes of a NIfTI header, before the voxels

  const unpacked = async text => {
    const bytes = Uint8Array.from(atob(text.trim()), letter => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  };

  // What a stored byte stands for; null where nothing is shown.
  const value = (layer, byte) => {
    if (byte === 0) return null;
    const share = (byte - 1) / 254;
    return layer.logarithmic
      ? layer.low * Math.pow(layer.high / layer.low, share)
      : layer.low + share * (layer.high - layer.low);
  };

  // Fixed minus registered, in the bytes of that layer.
  const subtracted = (fixed, warped, layer) => {
    const buffer = fixed.buffer.slice(0);
    const [of, a, b] = [buffer, fixed.buffer, warped.buffer].map(part => new Uint8Array(part, HEADER));
    const step = (fixed.high - fixed.low) / 254;
    for (let i = 0; i < of.length; i++) {
      const share = ((a[i] - b[i]) * step - layer.low) / (layer.high - layer.low);
      of[i] = 1 + Math.round(254 * Math.min(1, Math.max(0, share)));
    }
    return buffer;
  };

  const text = (layer, number) => {
    const digits = layer.unit === "HU" ? 0 : layer.unit ? 1 : 2;
    return `${number.toFixed(digits).replace("-", "−")}${layer.unit ? ` ${layer.unit}` : ""}`;
  };

  // The layers with their bytes; the library, run.
  const unpackedLayers = async () => {
    const layers = JSON.parse(at("layers").textContent);
    for (const layer of layers) if (layer.data) layer.buffer = await unpacked(layer.data);
    const [fixed, warped] = layers;
    for (const layer of layers) if (!layer.buffer) layer.buffer = subtracted(fixed, warped, layer);
    const program = document.createElement("script");
    program.textContent = new TextDecoder().decode(await unpacked(at("niivue").textContent));
    document.body.append(program);
    return layers;
  };

  // The fixed scan in three planes, and all other layers ready to be laid over it.
  const opened = async layers => {
    const { Niivue, NVImage } = globalThis.niivue;
    const view = new Niivue({
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      multiplanarShowRender: 0,
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.82, 0.29, 0.8],
      crosshairWidth: 0.6,
      dragAndDropEnabled: false,
      isResizeCanvas: true,
      logLevel: "error",
    });
    await view.attachToCanvas(at("canvas"));
    view.setSliceType(view.sliceTypeMultiplanar);
    for (const layer of layers) {
      // What is not shown gets the middle colour where that says nothing: at edges, colours run into each other.
      const table = layer.colours.with(0, layer.colours[layer.logarithmic ? 128 : 0]);
      const [R, G, B] = [0, 1, 2].map(c => table.map(rgb => rgb[c]));
      const places = R.map((_, i) => i);
      view.addColormap(`of-${layer.key}`, { R, G, B, A: places.map(i => (i ? 255 : 0)), I: places });
      layer.image = await NVImage.new(layer.buffer, `${layer.key}.nii`, `of-${layer.key}`, 1, null, 0, 255, true);
    }
    view.addVolume(layers[0].image);
    return view;
  };

  // What lies over the fixed scan.
  const chooseLayers = (view, layers) => {
    const select = at("layer"), opacity = at("opacity");
    for (const layer of layers.slice(1)) select.append(new Option(layer.title, layer.key));
    const fade = () => view.volumes.length > 1 && view.setOpacity(1, opacity.value / 100);
    const change = () => {
      for (const image of view.volumes.slice(1)) view.removeVolume(image);
      const layer = layers.slice(1).find(one => one.key === select.value);
      if (layer) {
        view.addVolume(layer.image);
        opacity.value = layer.unit === "HU" ? 100 : 70;
      }
      for (const bar of document.querySelectorAll("#scales > div")) bar.hidden = bar.dataset.layer !== select.value;
      fade();
      view.updateGLVolume();
    };
    select.addEventListener("change", change);
    opacity.addEventListener("input", fade);
  };

  // Where the planes are, and the values there.
  const choosePlace = (view, layers) => {
    const sliders = ["x", "y", "z"].map(at);
    // Shares from the right, front and feet, as the pictures lie; NiiVue counts from the left, back and feet.
    const mirrored = ([x, y, z]) => [1 - x, 1 - y, z];
    const tell = ({ vox: [i, j, k] }) => {
      const [, nx, ny] = layers[0].image.dimsRAS;
      const place = HEADER + i + nx * (j + ny * k);
      at("values").textContent = layers
        .map(layer => [layer, value(layer, new Uint8Array(layer.buffer)[place] ?? 0)])
        .filter(([, number]) => number !== null)
        .map(([layer, number]) => `${layer.title}: ${text(layer, number)}`)
        .join(" · ");
    };
    view.onLocationChange = location => {
      mirrored(view.scene.crosshairPos).forEach((share, axis) => (sliders[axis].value = share));
      tell(location);
    };
    const move = () => {
      view.scene.crosshairPos = mirrored(sliders.map(slider => Number(slider.value)));
      view.createOnLocationChange();
      view.drawScene();
    };
    for (const slider of sliders) slider.addEventListener("input", move);
    move();
  };

  const start = async () => {
    const layers = await unpackedLayers();
    document.querySelector(".viewer").hidden = false;
    const view = await opened(layers);
    chooseLayers(view, layers);
    choosePlace(view, layers);
    at("viewer-says").hidden = true;
    document.documentElement.dataset.viewer = "ready";
  };

  const able = () => {
    const canvas = document.createElement("canvas");
    return "DecompressionStream" in globalThis && canvas.getContext("webgl2") !== null;
  };

  if (at("layers") && able()) {
    start().catch(error => {
      document.querySelector(".viewer").hidden = true;
      at("viewer-says").textContent = `The viewer could not be started (${error.message}). The pictures stand for it.`;
      document.documentElement.dataset.viewer = "failed";
    });
  }
}
