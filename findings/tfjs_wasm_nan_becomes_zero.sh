#!/bin/sh
# On tensorflow.js' wasm backend a convolution turns NaN into -Infinity, or 0.
#
# Surprise: a convolution, depthwise or not, gives -Infinity for NaN; with the
# `relu` behind it, inside the operation or after it, that is 0: a broken number
# leaves the first layer as an ordinary one. An average with a NaN is -Infinity,
# `clipByValue` gives its lower limit and `relu6` 0, `relu` NaN; `maximum(a, b)`
# gives NaN if it is in `a` alone. A product of matrices gives NaN, and 0 with
# `relu` inside. On the cpu backend all of these are NaN, as in TensorFlow. One
# would guess that NaN reaches the end of a network on every backend, where the
# usual check of the answer finds it.
#
# Versions: see npm below; Node.js 20 or newer. Source: this program; the backend
# asks XNNPACK for limits of -Infinity and Infinity around each convolution, 0 and
# Infinity with `relu` (tfjs-backend-wasm/src/cc/conv2d_impl.cc), and in its pull
# request 3855 it says that XNNPACK promises nothing for NaN.
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

// What each backend makes of one NaN: the first number of the answer.
const images = () => tf.tensor4d([NaN, 1, 2, 3], [1, 2, 2, 1]);
const row = () => tf.tensor2d([[NaN, 1]]);
const kernel = () => tf.ones([1, 1, 1, 1]);
const operations = {
  conv2d: () => tf.conv2d(images(), kernel(), 1, 'valid'),
  'relu of conv2d': () => tf.relu(tf.conv2d(images(), kernel(), 1, 'valid')),
  'conv2d with relu': () => tf.fused.conv2d({
    x: images(), filter: kernel(), strides: 1, pad: 'valid',
    activation: 'relu'}),
  depthwiseConv2d: () => tf.depthwiseConv2d(images(), kernel(), 1, 'valid'),
  avgPool: () => tf.avgPool(images(), 2, 2, 'valid'),
  matMul: () => tf.matMul(row(), tf.ones([2, 1])),
  'matMul with relu': () => tf.fused.matMul(
      {a: row(), b: tf.ones([2, 1]), activation: 'relu'}),
  'clipByValue -1, 1': () => tf.clipByValue(row(), -1, 1),
  relu: () => tf.relu(row()),
  relu6: () => tf.relu6(row()),
  'maximum of NaN, 1': () => tf.maximum(row(), tf.ones([1, 2])),
  'maximum of 1, NaN': () => tf.maximum(tf.ones([1, 2]), row()),
  add: () => tf.add(row(), 1),
};
// Where the wasm backend does not give NaN.
const other = {
  conv2d: -Infinity,
  'relu of conv2d': 0,
  'conv2d with relu': 0,
  depthwiseConv2d: -Infinity,
  avgPool: -Infinity,
  'matMul with relu': 0,
  'clipByValue -1, 1': -1,
  relu6: 0,
  'maximum of 1, NaN': 1,
};

async function run(backend) {
  if (!await tf.setBackend(backend)) throw new Error(`no backend ${backend}`);
  return Object.values(operations).map((make) => make().dataSync()[0]);
}

(async () => {
  const cpu = await run('cpu');
  const found = await run('wasm');
  let same = true;
  Object.keys(operations).forEach((name, i) => {
    console.log(`${name}: cpu ${cpu[i]}, wasm ${found[i]}`);
    const expected = name in other ? other[name] : NaN;
    same &&= Number.isNaN(cpu[i]) && Object.is(found[i], expected);
  });
  process.exitCode = same ? 0 : 1;
})();
NODE
node run.cjs
