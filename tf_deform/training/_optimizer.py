# SPDX-License-Identifier: Apache-2.0
"""Gives the displacements of deformable layers a learning rate of their own.

The given optimizer changes its class, to a subclass that multiplies the rate
while it steps a variable of offsets. All else stays the optimizer's own. The
gradient is left alone, because Adam divides a factor of it out again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from tf_deform._keras import KERAS_2, keras
from tf_deform.ops._arguments import boolean
from tf_deform.training import _addons

_NAME = "DeformableOptimizer"
_Schedule = keras.optimizers.schedules.LearningRateSchedule
# Its steps grow while its rate falls.
_WITHOUT_RATE = ("ConditionalGradient",)


def deformable_optimizer(
    optimizer: Any, offset_multiplier: float = 0.1, decay_offsets: bool = True
) -> Any:
    """Lets an optimizer step offsets at a learning rate of their own.

    The variables of offsets are those that the layers of `tf_deform.layers`
    call `offset_...`: the kernel and bias of the branch, modulation included,
    and its hidden layers. They take the steps that a second optimizer of the
    same kind would take whose learning rate is `offset_multiplier` times the
    rate. So weight decay that is multiplied by the rate is multiplied by the
    offsets' own rate too, and decay that is not, as that of
    `tensorflow_addons`, is the same for all variables.

    The result is the optimizer itself, whose class has become a subclass of
    what it was: `learning_rate`, schedules, callbacks that set the rate,
    clipping, averages and loss scaling are its own, and so is the file of a
    model that is compiled with it.

        optimizer = tf_deform.training.deformable_optimizer(
            keras.optimizers.Adam(1e-3)
        )
        model.compile(optimizer, loss="mse")

    Args:
        optimizer: An optimizer of the Keras that `tf.keras` is, before its
            first step; on Keras 2 also a legacy one or one of
            `tensorflow_addons`. Of an optimizer around another one (for loss
            scaling or averages), the inner one is changed. A
            `tensorflow_addons.optimizers.MultiOptimizer` then also checks, when
            it is built, what it would get wrong without a word: it matches
            variables by name, and leaves out layers that had no weights when it
            was made.
        offset_multiplier: A number of at least 0, by which the rate of offsets
            is multiplied.
        decay_offsets: Whether the optimizer's weight decay acts on variables of
            offsets. Unlike Keras' `exclude_from_weight_decay`, a file keeps it.

    Returns:
        `optimizer`.

    Raises:
        TypeError: `optimizer` is none of this Keras, `offset_multiplier` is no
            number, or `decay_offsets` no bool.
        ValueError: `optimizer` has taken steps or has no learning rate, or
            `offset_multiplier` is negative, infinite or NaN.
    """
    if isinstance(offset_multiplier, bool) or not isinstance(
        offset_multiplier, numbers.Real
    ):
        raise TypeError(
            "Expected `offset_multiplier` to be a number. Received: "
            f"{offset_multiplier!r}"
        )
    if not 0 <= offset_multiplier < float("inf"):
        raise ValueError(
            "Expected `offset_multiplier` to be a finite number of at least 0. "
            f"Received: {offset_multiplier}"
        )
    decay = boolean(decay_offsets, "decay_offsets")
    _change(optimizer, float(offset_multiplier), decay)
    return optimizer


def _change(optimizer: Any, multiplier: float, decay: bool) -> None:
    """Gives an optimizer, or those within it, a rate for offsets."""
    if not isinstance(optimizer, _kinds()):
        raise TypeError(
            "Expected `optimizer` to be an optimizer of "
            f"{keras.__name__} {keras.__version__}, which is TensorFlow's "
            f"`tf.keras`. Received: {optimizer!r} of the type "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    inner = getattr(optimizer, "inner_optimizer", None)  # loss scaling
    if inner is None:
        inner = getattr(optimizer, "_optimizer", None)  # averages
    if inner is not None:
        _change(inner, multiplier, decay)
        return
    for name in ("_built", "built"):
        if getattr(optimizer, name, False) is True:
            raise ValueError(
                "Expected `optimizer` before its first step. Received: "
                f"{optimizer!r}, which has the state of variables already. Use "
                "a new optimizer"
            )
    base = type(optimizer)
    if _addons.is_multi(optimizer):
        for spec in optimizer.optimizer_specs:
            _change(spec["optimizer"], multiplier, decay)
    elif not _has_rate(optimizer):
        raise ValueError(
            "Expected `optimizer` to have a learning rate, of which its steps "
            f"are multiples. Received: {optimizer!r}"
        )
    if not isinstance(optimizer, _Deformable):
        object.__setattr__(optimizer, "__class__", _subclass(base))
    # No tracker of weights has to know these attributes.
    object.__setattr__(optimizer, "offset_multiplier", multiplier)
    object.__setattr__(optimizer, "decay_offsets", decay)


def _kinds() -> tuple[type, ...]:
    new = keras.optimizers.Optimizer
    return (new, keras.optimizers.legacy.Optimizer) if KERAS_2 else (new,)


def _is_legacy(kind: type) -> bool:
    return not issubclass(kind, keras.optimizers.Optimizer)


def _has_rate(optimizer: Any) -> bool:
    kind = type(optimizer)
    if any(base.__name__ in _WITHOUT_RATE for base in kind.__mro__):
        return False
    if _is_legacy(kind):
        return "learning_rate" in optimizer._hyper
    return getattr(optimizer, "_learning_rate", None) is not None and (
        kind.__name__ != "MultiOptimizer"
    )


def is_offset(variable: Any) -> bool:
    """Tells whether a variable's own name is one of offsets."""
    path = getattr(variable, "path", variable.name)  # Keras 2 has no `path`
    return path.split("/")[-1].startswith("offset_")


@keras.saving.register_keras_serializable(package="tf_deform", name=_NAME)
class _Deformable:
    """Saves an optimizer as the optimizer it was, and the multiplier.

    Every subclass is registered by the same name, so that a new process, which
    has made none of them, finds this class.
    """

    offset_multiplier = 1.0
    decay_offsets = True
    _at_offsets = False

    @contextlib.contextmanager
    def _rate_of_offsets(self) -> Iterator[None]:
        object.__setattr__(self, "_at_offsets", True)
        try:
            yield
        finally:
            object.__setattr__(self, "_at_offsets", False)

    def get_config(self) -> dict[str, Any]:
        # Serializes this optimizer as if its class had not changed.
        plain = object.__new__(type(self)._base)
        vars(plain).update(vars(self))
        saved = keras.optimizers.serialize(plain)
        if KERAS_2:  # finds only some of its classes by their own names
            name = keras.saving.get_registered_name(type(plain))
            saved.update(class_name=name, registered_name=name)
        config = {
            "optimizer": saved,
            "offset_multiplier": self.offset_multiplier,
        }
        if not self.decay_offsets:  # which older releases do not know
            config["decay_offsets"] = False
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Any:
        _addons.load_class(config["optimizer"])
        return deformable_optimizer(
            keras.optimizers.deserialize(
                config["optimizer"], custom_objects=custom_objects
            ),
            config["offset_multiplier"],
            config.get("decay_offsets", True),
        )


if KERAS_2:  # reads an optimizer within another in an .h5 file by this name
    keras.saving.get_custom_objects()[_NAME] = _Deformable


class _NewStep(_Deformable):
    """Scales the rate of Keras 3's optimizers, and of Keras 2's new ones."""

    _offset_keys: frozenset[str] = frozenset()

    def build(self, variables: Iterable[Any]) -> None:
        # `update_step` gets variables that have lost their names.
        keys = frozenset(map(self._var_key, filter(is_offset, variables)))
        object.__setattr__(self, "_offset_keys", keys)
        super().build(variables)

    @property
    def learning_rate(self) -> Any:
        rate = super().learning_rate
        return rate * self.offset_multiplier if self._at_offsets else rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        super(_NewStep, type(self)).learning_rate.fset(self, value)

    def update_step(self, gradient: Any, variable: Any, *rate: Any) -> Any:
        # Keras 3 hands over the rate, Keras 2's optimizers ask for it.
        if self._var_key(variable) not in self._offset_keys:
            return super().update_step(gradient, variable, *rate)
        rate = [value * self.offset_multiplier for value in rate]
        with self._rate_of_offsets():
            return super().update_step(gradient, variable, *rate)

    def _apply_weight_decay(self, variables: Iterable[Any]) -> None:
        parts = {True: [], False: []}
        for variable in variables:
            key = self._var_key(variable)
            parts[key in self._offset_keys].append(variable)
        super()._apply_weight_decay(parts[False])
        if not self.decay_offsets:
            return
        with self._rate_of_offsets():
            super()._apply_weight_decay(parts[True])


class _LegacyStep(_Deformable):
    """Scales the rate of Keras 2's legacy optimizers, and of the addons'."""

    def _get_hyper(self, name: str, dtype: Any = None) -> Any:
        value = super()._get_hyper(name, dtype)
        if name == "weight_decay" and self._at_offsets:
            if not self.decay_offsets:
                return tf.zeros((), dtype or tf.float32)
        if name != "learning_rate" or not self._at_offsets:
            return value
        if isinstance(value, _Schedule):
            step = tf.cast(self.iterations, dtype or tf.float32)
            value = tf.cast(value(step), step.dtype)
        return value * self.offset_multiplier


def _scaled(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method of legacy optimizers that scales the rate."""

    @functools.wraps(apply)
    def scaled(self: Any, grad: Any, variable: Any, *others: Any, **named: Any):
        if not is_offset(variable):
            return apply(self, grad, variable, *others, **named)
        # Without this argument the optimizer computes it, for this variable.
        named.pop("apply_state", None)
        with self._rate_of_offsets():
            return apply(self, grad, variable, *others, **named)

    # Keras reads here whether it may hand over `apply_state`.
    scaled.__signature__ = inspect.signature(apply)
    return scaled


class _Groups(_Deformable):
    """Checks the groups of the addons' MultiOptimizer."""

    def apply_gradients(self, grads_and_vars: Iterable[Any], **kwargs: Any):
        grads_and_vars = list(grads_and_vars)
        _addons.check_groups(
            self.optimizer_specs, [variable for _, variable in grads_and_vars]
        )
        return super().apply_gradients(grads_and_vars, **kwargs)


@functools.cache
def _subclass(base: type) -> type:
    """Makes the subclass of an optimizer's class, once."""
    body = {"_base": base, "__module__": __name__, "__doc__": base.__doc__}
    if _addons.is_multi(base):
        step = _Groups
    elif _is_legacy(base):
        step = _LegacyStep
        for name in ("_resource_apply_dense", "_resource_apply_sparse"):
            body[name] = _scaled(getattr(base, name))
    else:
        step = _NewStep
    made = type(_NAME, (step, base), body)
    register = keras.saving.register_keras_serializable("tf_deform", _NAME)
    return register(made)
