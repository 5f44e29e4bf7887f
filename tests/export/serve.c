// SPDX-License-Identifier: Apache-2.0
// Serves one request of a SavedModel in plain C, without Python.
//
//   serve LIBRARY|- SAVED_MODEL OUTPUT INPUT=DTYPE:SHAPE:FILE... > output.raw
//
// LIBRARY is what `tf-deform library` prints; "-" loads none. OUTPUT and
// INPUT are tensors of the signature, as saved_model_cli shows them, like
// StatefulPartitionedCall:0 and serving_default_image:0. SHAPE is like 2x32x48,
// FILE has the input's raw bytes in C order. Standard output gets the output's
// raw bytes in the same order. Exits with 1 and TensorFlow's message if a call
// fails, with 2 if the arguments are not valid.

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

enum { kMaxInputs = 8, kMaxRank = 8 };

// Prints one line and ends the program.
static void Fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  exit(code);
}

// Ends the program if the last call failed.
static void Check(const char* call, const TF_Status* status) {
  if (TF_GetCode(status) != TF_OK) Fail(1, "%s: %s", call, TF_Message(status));
}

// Returns the element type with this name.
static TF_DataType ToDataType(const char* name) {
  static const struct {
    const char* name;
    TF_DataType type;
  } kTypes[] = {{"float16", TF_HALF},  {"bfloat16", TF_BFLOAT16},
                {"float32", TF_FLOAT}, {"float64", TF_DOUBLE},
                {"uint8", TF_UINT8},   {"int32", TF_INT32},
                {"int64", TF_INT64}};
  for (size_t i = 0; i < sizeof(kTypes) / sizeof(kTypes[0]); ++i) {
    if (strcmp(name, kTypes[i].name) == 0) return kTypes[i].type;
  }
  Fail(2, "Expected a DTYPE like float32. Received: %s", name);
  return TF_FLOAT;
}

// Reads a number of 0 or more, and moves `text` behind it.
static int64_t ToInteger(const char** text) {
  char* end;
  errno = 0;
  const long long value = strtoll(*text, &end, 10);
  if (end == *text || errno != 0 || value < 0) {
    Fail(2, "Expected a number of 0 or more. Received: %s", *text);
  }
  *text = end;
  return value;
}

// Returns the tensor with this name in the graph.
static TF_Output Find(TF_Graph* graph, const char* name) {
  const char* colon = strrchr(name, ':');
  if (colon == NULL) {
    Fail(2, "Expected a tensor's name like x:0. Received: %s", name);
  }
  const char* digits = colon + 1;
  const int64_t index = ToInteger(&digits);
  const size_t length = (size_t)(colon - name);
  char* operation = calloc(length + 1, 1);
  if (operation == NULL) Fail(1, "Out of memory");
  memcpy(operation, name, length);
  TF_Output found = {TF_GraphOperationByName(graph, operation), (int)index};
  free(operation);
  if (found.oper == NULL || index >= TF_OperationNumOutputs(found.oper)) {
    Fail(1, "Expected a tensor of the graph. Received: %s", name);
  }
  return found;
}

// Reads a tensor described as DTYPE:SHAPE:FILE; changes `text`.
static TF_Tensor* Read(char* text) {
  char* shape = strchr(text, ':');
  char* path = shape == NULL ? NULL : strchr(shape + 1, ':');
  if (path == NULL) {
    Fail(2, "Expected DTYPE:SHAPE:FILE. Received: %s", text);
  }
  *shape++ = '\0';
  *path++ = '\0';
  const TF_DataType type = ToDataType(text);
  int64_t dims[kMaxRank];
  int rank = 0;
  size_t bytes = TF_DataTypeSize(type);
  for (const char* rest = shape; *rest != '\0'; ++rank) {
    if (rank == kMaxRank || (rank > 0 && *rest++ != 'x')) {
      Fail(2, "Expected a SHAPE like 2x32x48. Received: %s", shape);
    }
    dims[rank] = ToInteger(&rest);
    if (dims[rank] > 0 && bytes > SIZE_MAX / (size_t)dims[rank]) {
      Fail(2, "Expected a SHAPE that fits in memory. Received: %s", shape);
    }
    bytes *= (size_t)dims[rank];
  }
  TF_Tensor* tensor = TF_AllocateTensor(type, dims, rank, bytes);
  FILE* file = fopen(path, "rb");
  if (file == NULL) Fail(1, "%s: %s", path, strerror(errno));
  const size_t received = fread(TF_TensorData(tensor), 1, bytes, file);
  if (received != bytes || fgetc(file) != EOF) {
    Fail(1, "Expected %zu bytes in %s. Received: another number", bytes, path);
  }
  fclose(file);
  return tensor;
}

int main(int argc, char** argv) {
  const int num_inputs = argc - 4;
  if (num_inputs < 1 || num_inputs > kMaxInputs) {
    Fail(2,
         "usage: serve LIBRARY|- SAVED_MODEL OUTPUT INPUT=DTYPE:SHAPE:FILE... "
         "(%d at most) > output.raw",
         kMaxInputs);
  }
  const char* names[kMaxInputs];
  TF_Tensor* tensors[kMaxInputs];
  for (int i = 0; i < num_inputs; ++i) {
    char* equals = strchr(argv[4 + i], '=');
    if (equals == NULL) {
      Fail(2, "Expected INPUT=DTYPE:SHAPE:FILE. Received: %s", argv[4 + i]);
    }
    *equals = '\0';
    names[i] = argv[4 + i];
    tensors[i] = Read(equals + 1);
  }

  // The library comes before the model, because it registers the model's ops.
  TF_Status* status = TF_NewStatus();
  TF_Library* library = NULL;
  if (strcmp(argv[1], "-") != 0) {
    library = TF_LoadLibrary(argv[1], status);
    Check("TF_LoadLibrary", status);
  }

  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(
      options, NULL, argv[2], tags, 1, graph, NULL, status);
  Check("TF_LoadSessionFromSavedModel", status);

  TF_Output inputs[kMaxInputs];
  for (int i = 0; i < num_inputs; ++i) inputs[i] = Find(graph, names[i]);
  const TF_Output output = Find(graph, argv[3]);
  TF_Tensor* result = NULL;
  TF_SessionRun(session, NULL, inputs, tensors, num_inputs, &output, &result, 1,
                NULL, 0, NULL, status);
  Check("TF_SessionRun", status);
  if (TF_DataTypeSize(TF_TensorType(result)) == 0) {
    Fail(1, "Expected an output of numbers. Received: %s", argv[3]);
  }

  const size_t bytes = TF_TensorByteSize(result);
  if (fwrite(TF_TensorData(result), 1, bytes, stdout) != bytes ||
      fflush(stdout) != 0) {
    Fail(1, "Writing the output: %s", strerror(errno));
  }

  TF_DeleteTensor(result);
  for (int i = 0; i < num_inputs; ++i) TF_DeleteTensor(tensors[i]);
  TF_CloseSession(session, status);
  Check("TF_CloseSession", status);
  TF_DeleteSession(session, status);
  Check("TF_DeleteSession", status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  if (library != NULL) TF_DeleteLibraryHandle(library);
  TF_DeleteStatus(status);
  return 0;
}
