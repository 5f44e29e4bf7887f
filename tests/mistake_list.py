# SPDX-License-Identifier: Apache-2.0
"""Lists the mistakes that `mistakes.py` makes."""

from typing import NamedTuple


class Mistake(NamedTuple):
    """Describes one mistake.

    Attributes:
        name: The place of the mistake, and its kind.
        old: Text that the sources contain once, in any spacing.
        new: Text that replaces it.
        tests: Names of test files, without `.py`.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


CONV = ("deformable_conv2d_core_test",)
PSROI = ("pooling_core_test", "deformable_psroi_pool_core_test")
ALIGN = ("pooling_core_test", "deformable_roi_align_core_test")
CUDA_CONV = ("deformable_conv2d_cuda_test",)
CUDA_PSROI = ("pooling_cuda_test", "deformable_psroi_pool_cuda_test")
CUDA_ALIGN = ("pooling_cuda_test", "deformable_roi_align_cuda_test")
CONV_OP = ("every_op_test", "deformable_conv2d_test")
CONV_LAYER = ("deformable_conv2d_layer_test",)
EVERY_LAYER = ("contract_test",)

MISTAKES = [
    # The convolution on the CPU.
    Mistake(
        "cpu-conv-packed-block-of-other-filters",
        "f * PackedInner<O>(piece.count);",
        "f * PackedInner<O>(blocks.limit);",
        CONV,
    ),
    Mistake(
        "cpu-conv-predicted-mask-without-its-slope",
        "in.Slope(mask) *",
        "E(1) *",
        CONV_OP,
    ),
    Mistake(
        "cpu-conv-nan-of-first-pixel-alone",
        "if (!AnyNaN(offset + p * n, n)) continue;",
        "if (!AnyNaN(offset + first * n, n)) continue;",
        CONV_OP,
    ),
    Mistake(
        "tf-kept-memory-lent-twice",
        "kept_ = tensorflow::Tensor(); }",
        "kept_ = *memory; }",
        CONV_OP,
    ),
    Mistake(
        "cpu-conv-dy-is-dx",
        "dy[l] = from[l * in.offset_numbers];",
        "dy[l] = from[l * in.offset_numbers + 1];",
        CONV,
    ),
    Mistake(
        "cpu-conv-edge-included", "(y > in.y.above)", "(y >= in.y.above)", CONV
    ),
    Mistake(
        "cpu-conv-edge-one-pixel-early",
        "below(static_cast<E>(size)),",
        "below(static_cast<E>(size - 1)),",
        CONV,
    ),
    Mistake(
        "cpu-conv-clamp-excludes-zero",
        "if (clamp) above = -LeastPositive(E());",
        "if (clamp) above = E(0);",
        CONV,
    ),
    Mistake(
        "cpu-conv-clamp-holds-too-late",
        "const auto at_edge = pixel >= axis.last;",
        "const auto at_edge = pixel > axis.last;",
        CONV,
    ),
    Mistake(
        "cpu-conv-dilation-of-other-axis",
        "tap % g.kernel_w * g.dilation_w};",
        "tap % g.kernel_w * g.dilation_h};",
        CONV,
    ),
    Mistake(
        "cpu-conv-stride-of-other-axis",
        "x[p] = static_cast<E>(column * g.stride_w - g.pad_left);",
        "x[p] = static_cast<E>(column * g.stride_h - g.pad_left);",
        CONV,
    ),
    Mistake(
        "cpu-conv-offset-group-within-bundle",
        "const int64_t offset_group = channel / g.offset_channels;",
        "const int64_t offset_group = in_bundle / g.offset_channels;",
        CONV,
    ),
    Mistake(
        "cpu-conv-forward-without-mask",
        "StoreColumns(value * mask, to + i);",
        "StoreColumns(value, to + i);",
        CONV,
    ),
    Mistake(
        "cpu-conv-gradient-without-mask",
        "const V scaled = mask * gradient;",
        "const V scaled = gradient;",
        CONV,
    ),
    Mistake(
        "cpu-conv-slope-sign",
        "const V right = Load<kN>(from.top_right + i) - top_left;",
        "const V right = top_left - Load<kN>(from.top_right + i);",
        CONV,
    ),
    Mistake(
        "cpu-conv-lost-update-of-deferred",
        "Store(Load<kN>(at + i) + weight * scaled, at + i);",
        "Store(weight * scaled, at + i);",
        CONV,
    ),
    Mistake(
        "cpu-conv-deferred-added-twice",
        "const int32_t others = flags & kInside & ~mine;",
        "const int32_t others = flags & kInside;",
        CONV,
    ),
    Mistake(
        "cpu-conv-workers-slice",
        "g.total_pixels * (tile + 1) / tiles - first;",
        "g.total_pixels / tiles;",
        CONV,
    ),
    Mistake(
        "cpu-conv-lost-sums-of-a-pair-of-strips",
        "for (int64_t pair = 1; pair < plan.pairs; ++pair) {",
        "for (int64_t pair = 1; pair + 1 < plan.pairs; ++pair) {",
        CONV,
    ),
    Mistake(
        "cpu-conv-depthwise-multiplier",
        "const int64_t filter = run->channel * g.group_filters;",
        "const int64_t filter = run->channel;",
        CONV,
    ),
    Mistake(
        "cpu-rounding-bfloat16-cut-off",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
        "bits >> 16;",
        CONV,
    ),
    # Pooling on the CPU.
    Mistake(
        "cpu-psroi-class-index",
        "bin.displacement = (place.part * rule.classes + k) * 2;",
        "bin.displacement = place.part * rule.classes * 2;",
        PSROI,
    ),
    Mistake(
        "cpu-psroi-class-of-a-lane",
        "if (++in_class == rule.class_channels) in_class = 0, pair += 2;",
        "if (++in_class > rule.class_channels) in_class = 0, pair += 2;",
        PSROI,
    ),
    Mistake(
        "cpu-psroi-group-index",
        "cell(ph * g.group_h / g.pooled_h * g.group_w +",
        "cell(ph * g.group_h / g.pooled_h * g.group_h +",
        PSROI,
    ),
    Mistake(
        "cpu-psroi-counts-all-samples",
        "samples = end - begin;",
        "samples = axis.samples;",
        PSROI,
    ),
    Mistake(
        "cpu-roi-dx-is-dy",
        "x += rule.Displacement(pair[1], roi.x.size);",
        "x += rule.Displacement(pair[0], roi.x.size);",
        ALIGN,
    ),
    Mistake(
        "cpu-roi-held-edge-has-slope",
        "auto held = [=](E place) { return place < 0 || place >= last; };",
        "auto held = [=](E place) { return place < 0 || place > last; };",
        ALIGN,
    ),
    Mistake(
        "cpu-roi-mean-without-share",
        "const E weight = y.weight[a] * x.weight[b] * share;",
        "const E weight = y.weight[a] * x.weight[b];",
        ALIGN,
    ),
    Mistake(
        "cpu-roi-padding-left-as-it-was",
        "row.image < 0 ? first_image == 0",
        "row.image < 0 ? false",
        ALIGN,
    ),
    Mistake(
        "cpu-roi-slope-of-other-size",
        "along_x * share * rule.DisplacementSlope(roi.x.size);",
        "along_x * share * rule.DisplacementSlope(roi.y.size);",
        ALIGN,
    ),
    # Checks of arguments, and their texts.
    Mistake(
        "core-message",
        "Expected `%s` to have %s %lld (%s). Received: %s.shape=%s",
        "Expected `%s` to have %s %lld (%s). Found: %s.shape=%s",
        ("pooling_shapes_core_test",),
    ),
    Mistake(
        "core-same-odd-pixel-before",
        "*before = total / 2;",
        "*before = total - total / 2;",
        CONV,
    ),
    Mistake(
        "core-mask-not-judged",
        "if (shapes.mask != nullptr) { TF_DEFORM_RETURN_IF_ERROR( "
        'CheckField(*shapes.mask, "mask", mask_channels, "", p)); }',
        "",
        CONV,
    ),
    Mistake(
        "core-batch-index-of-next-image",
        "if (index < static_cast<E>(batch) && index == std::floor(index))",
        "if (index <= static_cast<E>(batch) && index == std::floor(index))",
        PSROI,
    ),
    # CUDA kernels, emulated.
    Mistake(
        "cuda-conv-mask-of-missing-pixel",
        "mask == nullptr ? 1 : mask[pixel.index * g.mask_step + field]};",
        "mask == nullptr ? 1 : mask[field]};",
        CUDA_CONV,
    ),
    Mistake(
        "cuda-conv-factor-of-zero",
        "return divisor < 8e37f ? nearer : near;",
        "return near;",
        CUDA_CONV,
    ),
    Mistake(
        "cuda-conv-gradient-of-factor",
        "return static_cast<E>(g.most) * sigmoid * (1 - sigmoid);",
        "return sigmoid * (1 - sigmoid);",
        CUDA_CONV,
    ),
    Mistake(
        "cuda-conv-nan-of-next-pixel",
        "j * kThreads + __ffs(found) - 1;",
        "j * kThreads + __ffs(found);",
        CUDA_CONV,
    ),
    Mistake(
        "cuda-conv-edge-included",
        "(g.clamp ? x >= 0 : x > -1)",
        "(g.clamp ? x >= 0 : x >= -1)",
        CUDA_CONV,
    ),
    Mistake(
        "cuda-conv-right-edge",
        "const bool held = clamp && at >= size - 1;",
        "const bool held = clamp && at > size - 1;",
        CUDA_CONV,
    ),
    Mistake(
        "cuda-conv-ordered-lost-update",
        "corners.steps[k] + channel] += corners.weights[k] * share;",
        "corners.steps[k] + channel] = corners.weights[k] * share;",
        CUDA_CONV,
    ),
    Mistake(
        "cuda-roi-edge",
        "if (!(raw >= least && raw <= most)) continue;",
        "if (!(raw >= least && raw < most)) continue;",
        CUDA_PSROI,
    ),
    Mistake(
        "cuda-roi-second-window-lost",
        "if (count + 2 > kWindow) {",
        "if (count + 2 > kWindow && !Rule::kMeanOfAll) {",
        CUDA_ALIGN,
    ),
    # TensorFlow's and XLA's glue.
    Mistake(
        "tf-shape-function",
        "context->Dim(context->input(dim.operand), dim.axis)",
        "context->Dim(context->input(dim.operand), 0)",
        CONV_OP,
    ),
    Mistake(
        "tf-shape-of-unwanted-gradient",
        "wanted[output] ? context->input(operand) : context->Vector(0)",
        "context->input(operand)",
        CONV_OP,
    ),
    Mistake(
        "tf-explicit-paddings-exchanged",
        "params->pad_bottom = paddings[1]; params->pad_left = paddings[2];",
        "params->pad_bottom = paddings[2]; params->pad_left = paddings[1];",
        CONV_OP,
    ),
    Mistake(
        "tf-double-as-float",
        "*value += is_normal ? part : bits >> 31 != 0 ? -size : size;",
        "*value = is_normal ? part : bits >> 31 != 0 ? -size : size;",
        ("pooling_test",),
    ),
    Mistake(
        "xla-wanted-lost",
        "wanted_.assign(wanted.begin(), wanted.end());",
        "wanted_.assign(wanted.size(), true);",
        ("xla_test",),
    ),
    Mistake(
        "xla-unwanted-gradients-kept",
        "results->push_back(wanted_[output] ? operands[operand] : empty);",
        "results->push_back(operands[operand]);",
        ("xla_test",),
    ),
    # Functions.
    Mistake(
        "ops-coordinates-in-float32",
        "return tf.float64 if dtype == tf.float64 else tf.float32",
        "return tf.float32",
        CONV_OP,
    ),
    Mistake(
        "ops-all-gradients-wanted",
        "return [index not in skipped for index in range(len(op.inputs))]",
        "return [True for index in range(len(op.inputs))]",
        CONV_OP,
    ),
    Mistake(
        "ops-flops",
        "samplings = inputs + kernel + any(fields)",
        "samplings = inputs + kernel + sum(fields)",
        ("registration_test",),
    ),
    Mistake(
        "ops-number-as-float32",
        "return [high, value - high] if np.isfinite(high) else [high]",
        "return [high]",
        ("pooling_test",),
    ),
    Mistake(
        "ops-unknown-option-is-the-last",
        "return options[options.index(value)]\n    *others",
        "return options[options.index(value)]\n    return options[-1]\n"
        "    *others",
        ("arguments_test",),
    ),
    # Stock TensorFlow ops.
    Mistake(
        "portable-conv-edge-included",
        "inside = (y > -1) & (y < last_y + 1)",
        "inside = (y >= -1) & (y < last_y + 1)",
        ("portable_test",),
    ),
    Mistake(
        "portable-conv-held-too-late",
        "y = tf.where(row >= last_y, tf.zeros_like(y), y)",
        "y = tf.where(row > last_y, tf.zeros_like(y), y)",
        ("portable_test",),
    ),
    Mistake(
        "portable-conv-mask-outside",
        "factor = tf.compat.v1.where(inside, factor, tf.zeros_like(factor))",
        "pass",
        ("portable_test",),
    ),
    Mistake(
        "portable-roi-clamped-has-slope",
        "moves = counts & (place >= 0) & (place < last)",
        "moves = counts & (place >= 0) & (place <= last)",
        ("portable_test",),
    ),
    Mistake(
        "portable-roi-part-of-bin",
        "displacements = tf.gather(displacements, part_of_bin, axis=1)",
        "displacements = tf.gather(displacements, np.sort(part_of_bin)[::-1], "
        "axis=1)",
        ("portable_test",),
    ),
    Mistake("portable-2sigmoid", "mask *= 2", "mask *= 1", ("portable_test",)),
    Mistake(
        "portable-fields-split",
        "displacements = 2 * offset_groups * taps",
        "displacements = 2 * taps",
        ("portable_test",),
    ),
    Mistake(
        "portable-nan-hidden",
        '"mask" else hand_on_nan(output, fields)',
        '"mask" else output',
        ("portable_test",),
    ),
    Mistake(
        "portable-second-gradient-unweighted",
        "return outer.gradient(first_gradients, targets, seconds)",
        "return outer.gradient(first_gradients, targets)",
        ("second_derivatives_test",),
    ),
    # Layers.
    Mistake(
        "layer-other-factors",
        'modulation = self.modulation or "none"',
        'modulation = "sigmoid" if self.modulation else "none"',
        CONV_LAYER,
    ),
    Mistake(
        "layer-config-without-dilation",
        '"offset_dilation_rate": self.offset_dilation_rate,',
        "",
        EVERY_LAYER,
    ),
    Mistake(
        "layer-branch-not-centred",
        "result.append((before - spare // 2, after - (spare - spare // 2)))",
        "result.append((before, after - spare))",
        CONV_LAYER,
    ),
    Mistake(
        "layer-nan-hidden",
        "outputs = hand_on_nan(outputs, offset)",
        "pass",
        ("nan_test",),
    ),
    Mistake(
        "layer-frozen-kernel-costs",
        "if not trainable and not self.lora_enabled:",
        "if False:",
        ("every_op_test",),
    ),
    Mistake(
        "layer-offset-in-compute-dtype",
        "return tf.cast(tensor, dtype)\n\n\ndef to_inputs",
        "return tf.cast(tf.cast(tensor, tf.bfloat16), dtype)\n\n\n"
        "def to_inputs",
        ("types_test",),
    ),
    Mistake(
        "layer-branch-not-saved",
        "store[name] = _keras.stored(weight)",
        "store[name] = 0 * _keras.stored(weight)",
        EVERY_LAYER,
    ),
    Mistake(
        "layer-data-format-of-outputs",
        "return tf.transpose(value, (0, 3, 1, 2))",
        "return tf.transpose(value, (0, 3, 2, 1))",
        ("data_format_test",),
    ),
    Mistake(
        "layer-message-in-the-ops-words",
        '_OP_NAMES = {"offset": "trans"}',
        "_OP_NAMES = {}",
        ("arguments_test",),
    ),
    Mistake(
        "layer-build-config-of-inputs-alone",
        "if len(self._built_for) == 1:",
        "if self._built_for:",
        (*EVERY_LAYER, "conv2d_calls_test"),
    ),
    Mistake(
        "roi-layer-config-in-keras-format",
        'config = {"data_format": "channels_last", **config}',
        "pass",
        ("data_format_test",),
    ),
    Mistake(
        "roi-layer-branch-on-padding",
        "fields = tf.where(exists, fields, tf.zeros_like(fields))",
        "pass",
        ("nan_test",),
    ),
    Mistake(
        "roi-layer-factors-of-other-bins",
        "outputs *= tf.cast(factor, outputs.dtype)",
        "outputs *= tf.cast(factor[:, ::-1], outputs.dtype)",
        EVERY_LAYER,
    ),
    Mistake(
        "roi-layer-class-of-nan",
        "index = np.arange(bins) * parts // bins",
        "index = np.arange(bins) % parts",
        ("nan_test",),
    ),
    Mistake(
        "roi-layer-units-lost",
        'return {**super().get_config(), "units": self.units}',
        "return super().get_config()",
        EVERY_LAYER,
    ),
    # Files.
    Mistake(
        "loader-order-of-frozen-layers",
        "if number <= last.get(kind, -1):",
        "if False:",
        ("plain_weights_test", "plain_weights_refused_test"),
    ),
    Mistake(
        "loader-half-loaded",
        "variable.assign(value) raise",
        "pass\n        raise",
        ("plain_weights_test", "plain_weights_refused_test"),
    ),
    Mistake(
        "loader-bfloat16",
        "if is_bfloat16(entry.arrays[name]):",
        "if False:",
        ("plain_weights_test", "plain_weights_refused_test"),
    ),
    Mistake(
        "files-other-folder-replaced",
        "if not found or name in found:",
        "if True:",
        ("files_test",),
    ),
    Mistake(
        "training-decay-of-offsets-at-full-rate",
        "with self._rate_of_offsets(): super()._apply_weight_decay",
        "super()._apply_weight_decay",
        ("optimizer_test",),
    ),
    Mistake(
        "training-offsets-by-the-layers-name",
        'path.split("/")[-1].startswith("offset_")',
        '"offset_" in path',
        ("optimizer_test",),
    ),
    Mistake(
        "export-onnx-boundary",
        'if attributes["boundary"] != "zeros" or not known:',
        "if not known:",
        ("onnx_control_flow_test",),
    ),
    Mistake(
        "export-onnx-same-odd-pixel",
        "before = [(span - 1) // 2 for span in spans]",
        "before = [span // 2 for span in spans]",
        ("export_test",),
    ),
    Mistake(
        "export-comparison-of-last-output",
        "differences[name] = max(found, differences.get(name, 0.0))",
        "differences[name] = found",
        ("export_check_test", "writing_test"),
    ),
    Mistake(
        "export-portable-not-checked",
        "if node.op.startswith(_source.NAMESPACE):",
        "if False:",
        ("export_test",),
    ),
    Mistake(
        "export-litert-positions-in-int8",
        "recipe.add_weight_only_config(_one_of(found.places), name, 8)",
        "pass",
        ("litert_quantized_test",),
    ),
    # The choice of the op library.
    Mistake(
        "library-of-another-version",
        "if _minor(built) != _minor(installed):",
        "if not found:",
        ("libraries_test",),
    ),
    Mistake(
        "library-although-not-listed",
        "if _build_info.LIBRARIES:",
        "if os.path.exists(LIBRARY):",
        ("libraries_test",),
    ),
]
