// SPDX-License-Identifier: Apache-2.0
// Runs an ONNX file: node onnx.mjs RUNTIME MODEL FOLDER, see ../export_table.py.
import {readCases, writeAnswers} from './tensors.mjs';

const [runtime, model, folder] = process.argv.slice(2);
const ort = await import(runtime);
if (runtime === 'onnxruntime-web') ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(model);
const answers = [];
for (const given of readCases(folder)) {
  const feeds = {};
  for (const {name, dtype, shape, data} of given)
    feeds[name] = new ort.Tensor(dtype, data, shape);
  const answer = [];
  for (const [name, value] of Object.entries(await session.run(feeds)))
    answer.push({name, dtype: value.type, shape: value.dims, data: value.data});
  answers.push(answer);
}
writeAnswers(folder, answers);
