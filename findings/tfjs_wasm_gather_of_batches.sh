#!/bin/sh
# tensorflow.js' wasm backend gathers with `batchDims` what nobody asked for.
#
# Surprise: `tf.gather(x, indices, 1, 1)` takes each sample's own indices on the
# cpu backend. On the wasm backend the indices of sample i begin at i times the
# number of samples instead of i times the number of indices: right for one sample
# and for as many indices as samples, silently wrong for all else (with fewer
# indices than samples it reads past their end; not run here). One would guess
# that two backends of one release give one answer; a test with two samples of two
# indices says that they do.
#
# Versions: see npm below; Node.js 20 or newer. Source: the kernel,
# tfjs-backend-wasm/src/cc/kernels/Gather.cc, steps by the number of samples from
# one sample's indices to the next one's; reported as tensorflow/tfjs issue 8658.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --ignore-scripts --no-audit --no-fund --silent --prefix "$folder" \
    @tensorflow/tfjs@4.22.0 @tensorflow/tfjs-backend-wasm@4.22.0
cat > run.cjs <<'NODE'
const path = require('node:path');
const tf = require('@tensorflow/tfjs');
const wasm = require('@tensorflow/tfjs-backend-wasm');

const files = require.resolve('@tensorflow/tfjs-backend-wasm/package.json');
wasm.setWasmPaths(path.join(path.dirname(files), 'wasm-out') + path.sep);

// Samples of six numbers, and how many of them to take from each.
const cases = [[1, 4], [2, 2], [2, 3], [2, 4], [3, 3], [3, 4]];

async function run(backend) {
  if (!await tf.setBackend(backend)) throw new Error(`no backend ${backend}`);
  return cases.map(([samples, count]) => {
    const x = tf.range(0, samples * 6).reshape([samples, 6]);
    const picked = Array.from(
        {length: samples}, (_, i) => [5, 0, 3, 1].slice(0, count).map(
            (k) => (k + i) % 6));
    const indices = tf.tensor2d(picked, [samples, count], 'int32');
    const expected = picked.map((row, i) => row.map((k) => 6 * i + k));
    const found = JSON.stringify(tf.gather(x, indices, 1, 1).arraySync());
    const right = found === JSON.stringify(expected);
    console.log(
        `${backend}: ${count} of each of ${samples}: ${found}`,
        right ? 'right' : `expected ${JSON.stringify(expected)}`);
    return right;
  });
}

(async () => {
  const cpu = await run('cpu');
  const found = await run('wasm');
  const expected = cases.map(
      ([samples, count]) => samples === 1 || samples === count);
  const same = cpu.every((right) => right) &&
      found.join() === expected.join();
  process.exitCode = same ? 0 : 1;
})();
NODE
node run.cjs
