// SPDX-License-Identifier: Apache-2.0
// Tensors between Python and Node.js: a file of bytes each, and a list of them.
import fs from 'node:fs';
import path from 'node:path';

const ARRAYS = {
  float32: Float32Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  bool: Uint8Array,
};

// The inputs: for each case a list of {name, dtype, shape, data}.
export function readCases(folder) {
  const cases = JSON.parse(fs.readFileSync(path.join(folder, 'cases.json')));
  return cases.map((tensors) => tensors.map((tensor) => {
    const bytes = fs.readFileSync(path.join(folder, tensor.file));
    const buffer = bytes.buffer.slice(
        bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
    return {...tensor, data: new ARRAYS[tensor.dtype](buffer)};
  }));
}

// The outputs, likewise, and whatever else is worth knowing.
export function writeAnswers(folder, answers, note = '') {
  const listed = answers.map((tensors, i) => tensors.map((tensor, k) => {
    const {name, dtype, shape} = tensor;
    const file = `answer_${i}_${k}.bin`;
    const data = ARRAYS[dtype].from(tensor.data);
    fs.writeFileSync(path.join(folder, file), Buffer.from(data.buffer));
    return {name, dtype, shape, file};
  }));
  fs.writeFileSync(
      path.join(folder, 'answers.json'), JSON.stringify({note, answers: listed}));
}
