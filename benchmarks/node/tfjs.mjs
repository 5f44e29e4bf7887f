// SPDX-License-Identifier: Apache-2.0
// Runs a tensorflow.js model: node tfjs.mjs BACKEND MODEL_FOLDER FOLDER, see
// ../export_table.py.
import fs from 'node:fs';
import {createRequire} from 'node:module';
import path from 'node:path';

import {readCases, writeAnswers} from './tensors.mjs';

const require = createRequire(import.meta.url);
const tf = require('@tensorflow/tfjs');

const [backend, model, folder] = process.argv.slice(2);
if (backend === 'wasm') {
  const wasm = require('@tensorflow/tfjs-backend-wasm');
  const home = require.resolve('@tensorflow/tfjs-backend-wasm/package.json');
  wasm.setWasmPaths(path.join(path.dirname(home), 'wasm-out') + path.sep);
}
if (!await tf.setBackend(backend)) throw new Error(`no backend ${backend}`);

const read = (name) => fs.readFileSync(path.join(model, name));
const described = JSON.parse(read('model.json'));
const manifest = described.weightsManifest;
const bytes = Buffer.concat(manifest.flatMap(({paths}) => paths.map(read)));
const loaded = await tf.loadGraphModel(tf.io.fromMemory({
  modelTopology: described.modelTopology,
  weightSpecs: manifest.flatMap(({weights}) => weights),
  weightData: bytes.buffer.slice(
      bytes.byteOffset, bytes.byteOffset + bytes.byteLength),
  signature: described.signature,
}));
const {inputs, outputs} = described.signature;
const names = Object.keys(outputs);
const wanted = names.map((name) => outputs[name].name);

let note = '';
const answers = [];
for (const given of readCases(folder)) {
  const feeds = {};
  for (const {name, dtype, shape, data} of given) {
    const kind = dtype === 'float32' ? 'float32' : 'int32';
    const values = kind === 'float32' ? data : Int32Array.from(data);
    feeds[inputs[name].name] = tf.tensor(values, shape, kind);
  }
  let found;
  try {
    found = loaded.execute(feeds, wanted);
  } catch (error) {
    if (!/executeAsync/.test(error.message)) throw error;
    note = 'executeAsync';
    found = await loaded.executeAsync(feeds, wanted);
  }
  found = Array.isArray(found) ? found : [found];
  answers.push(found.map((tensor, k) => (
    {name: names[k], dtype: tensor.dtype, shape: tensor.shape,
     data: tensor.dataSync()})));
}
writeAnswers(folder, answers, note);
