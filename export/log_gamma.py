"""The logarithm of the gamma function, which torch does not translate."""

from __future__ import annotations

import math
from typing import Any

from onnx import helper
from onnxscript import opset18

_FLOAT, _DOUBLE = 1, 11
_BEGIN = 8  # the series' error is below 1e-17 relative from here
# B_2k / (2k (2k - 1)), k from 1
_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
op: Any = opset18


def lgamma(self: Any) -> Any:
    """log |gamma(x)| of numbers [...], computed in float64.

    Stirling's series from 8 on, numbers below brought there by x gamma(x) = gamma(x + 1), and those below 1/2 by
    gamma(x) gamma(1 - x) = pi / sin(pi x): NIST Digital Library of Mathematical Functions, 5.11.1, 5.5.1 and 5.5.3,
    https://dlmf.nist.gov/5. At whole numbers that are not positive it is infinite, as torch's is.
    """
    is_float = self.dtype is not None and self.dtype.is_floating_point()
    x = op.Cast(self, to=_DOUBLE)
    size = op.Abs(x)
    is_small = op.Less(x, _number(0.5))
    direct = _from_a_half(op.Where(is_small, op.Sub(_number(1.0), x), x))
    sine = op.Sin(op.Mul(_number(math.pi), op.Sub(size, op.Floor(size))))
    mirrored = op.Sub(op.Log(op.Div(_number(math.pi), sine)), direct)
    result = op.Where(op.IsInf(x), size, op.Where(is_small, mirrored, direct))
    return op.CastLike(result, self) if is_float else op.Cast(result, to=_FLOAT)


def _from_a_half(x: Any) -> Any:
    is_near = op.Less(x, _number(_BEGIN))
    factor = op.Where(is_near, x, _number(1.0))
    product = factor
    for i in range(1, _BEGIN):
        product = op.Mul(product, op.Add(factor, _number(i)))
    z = op.Where(is_near, op.Add(x, _number(_BEGIN)), x)
    inverse = op.Reciprocal(z)
    square = op.Mul(inverse, inverse)
    series = _number(_SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = op.Add(op.Mul(series, square), _number(coefficient))
    # (z - 1/2) log z - z, in a form that is infinite where z is
    main = op.Sub(op.Mul(op.Sub(z, _number(0.5)), op.Sub(op.Log(z), _number(1.0))), _number(0.5))
    sum_ = op.Add(op.Add(main, _number(math.log(2 * math.pi) / 2)), op.Mul(series, inverse))
    return op.Where(is_near, op.Sub(sum_, op.Log(product)), sum_)


def _number(value: float) -> Any:
    return op.Constant(value=helper.make_tensor("", _DOUBLE, (), [value]))
