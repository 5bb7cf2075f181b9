"""The KD loss of dense targets: one program a row, two sweeps over it, nothing allocated.

The first sweep keeps, online, the maximum m, the sum Z and the sum W of weight times gap of both softmaxes; the second
writes the gradient over the logits, from the row's end to its beginning, so that it begins with what is still in cache.
Everything is relative to the row's maximum: no term is larger than the row is wide, and a logit of bf16 is subtracted
from it without rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentforge.kernels.triton.logits import INF, NAN, at_one, below, over_raw, raised, rounded, row_of, shaped

# One compiled kernel serves every size and address: what would make it another one is said by a switch.
INTEGERS = ["student_stride", "teacher_stride", "vocab", "ignore_index"]
POINTERS = ["student", "teacher", "labels", "bias", "ce_out", "kd_out"]


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def kd_dense(
    student,  # [rows, vocab], overwritten by the gradient where WRITE
    teacher,  # [rows, vocab], or None: cross-entropy alone
    labels,  # [rows] int64, or None: no cross-entropy
    bias,  # [vocab], or None
    ce_out,  # [rows] fp32
    kd_out,  # [rows] fp32
    student_stride,
    teacher_stride,
    vocab,
    ignore_index,
    inverse,  # 1 / T of the student, and of the teacher
    inverse_teacher,
    exponent,  # log2(e) / T of both
    exponent_teacher,
    ce_scale,  # of the gradient
    kd_scale,  # of the gradient, over T
    logit_scale,
    soft_cap,
    REVERSE: tl.constexpr,
    ROOT: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    WRITE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = row_of(student, row, student_stride, ALIGNED)
    if teacher is not None:
        teacher = row_of(teacher, row, teacher_stride, ALIGNED)
    live = row >= 0
    s_label = 0.0
    label = -1
    if labels is not None:
        label = tl.load(labels + row)
        live = label != ignore_index
        label = tl.where(live, label, 0)
        s_label = shaped(tl.load(student + label), bias, label, live, logit_scale, soft_cap, SCALED, CAPPED)
    read = tl.where(live, vocab, 0)  # ignored rows are not even read

    m_s = -INF
    m_t = -INF
    z_s = tl.zeros([BLOCK], tl.float32)
    z_t = tl.zeros([BLOCK], tl.float32)
    z_1 = tl.zeros([BLOCK], tl.float32)
    w = tl.zeros([BLOCK], tl.float32)
    missed = tl.full([BLOCK], -INF, tl.float32)
    for start in range(0, read, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = below(cols, vocab, ALIGNED)
        x = tl.load(student + cols, mask=inside, other=-INF)
        s = shaped(x, bias, cols, inside, logit_scale, soft_cap, SCALED, CAPPED)
        n_s = tl.maximum(m_s, tl.max(s, 0))
        base_s, step_s = raised(m_s, n_s)
        m_s = n_s
        d_s = s - base_s
        e_s = tl.exp2(d_s * exponent)
        shrink_s = tl.exp2(step_s * exponent)
        if labels is not None and ROOT != 1:
            z_1 = z_1 * at_one(shrink_s, step_s, ROOT) + at_one(e_s, d_s, ROOT)
        if teacher is not None:
            t = tl.load(teacher + cols, mask=inside, other=-INF).to(tl.float32)
            n_t = tl.maximum(m_t, tl.max(t, 0))
            base_t, step_t = raised(m_t, n_t)
            m_t = n_t
            d_t = t - base_t
            e_t = tl.exp2(d_t * exponent_teacher)
            shrink_t = tl.exp2(step_t * exponent_teacher)
            gap = d_t * inverse_teacher - d_s * inverse
            drift = step_t * inverse_teacher - step_s * inverse
            # w is the sum of weight * gap, and both maxima may have moved under it. A weight that has shrunk to
            # nothing takes its gap along, even an infinite one.
            if REVERSE:
                w = tl.where(shrink_s > 0, shrink_s * (w - z_s * drift), 0.0)
                w += tl.where((e_s > 0) & (t > -INF), e_s * -gap, 0.0)
                missed = tl.maximum(missed, tl.where(t == -INF, s, -INF))
            else:
                w = tl.where(shrink_t > 0, shrink_t * (w + z_t * drift), 0.0)
                w += tl.where((e_t > 0) & (s > -INF), e_t * gap, 0.0)
                missed = tl.maximum(missed, tl.where(s == -INF, t, -INF))
            z_t = z_t * shrink_t + e_t
        z_s = z_s * shrink_s + e_s

    sum_s = tl.sum(z_s, 0)
    log_s = tl.log(sum_s)
    good = (sum_s > 0) & (sum_s < INF)  # not so: a NaN, plus infinity, or nothing finite
    sum_t = 1.0
    log_t = 0.0
    kd = 0.0
    if teacher is not None:
        sum_t = tl.sum(z_t, 0)
        log_t = tl.log(sum_t)
        good = good & (sum_t > 0) & (sum_t < INF)
        # What has weight on one side and is excluded by the other costs an infinity, unless the weight is nothing.
        largest = tl.max(missed, 0)
        if REVERSE:
            kd = tl.sum(w, 0) / sum_s - log_s + log_t
            kd = tl.where(tl.exp2((largest - m_s) * exponent) / sum_s > 0, INF, kd)
        else:
            kd = tl.sum(w, 0) / sum_t - log_t + log_s
            kd = tl.where(tl.exp2((largest - m_t) * exponent_teacher) / sum_t > 0, INF, kd)
    sum_1 = sum_s
    ce = 0.0
    if labels is not None:
        if ROOT != 1:
            sum_1 = tl.sum(z_1, 0)
        ce = (m_s - s_label) + tl.log(sum_1)
    tl.store(ce_out + row, tl.where(live, tl.where(good, ce, NAN), 0.0))
    tl.store(kd_out + row, tl.where(live, tl.where(good, kd, NAN), 0.0))

    if WRITE:
        good = good & ((kd < INF) | (not REVERSE) | (kd_scale == 0.0))
        over_s = 1.0 / sum_s
        over_t = 1.0 / sum_t
        over_1 = 1.0 / sum_1
        blocks = tl.cdiv(vocab, BLOCK)
        for block in range(blocks):
            cols = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
            inside = below(cols, vocab, ALIGNED)
            readable = below(cols, read, ALIGNED)
            x = tl.load(student + cols, mask=readable, other=-INF)
            s = shaped(x, bias, cols, inside, logit_scale, soft_cap, SCALED, CAPPED)
            d_s = s - m_s
            e_s = tl.exp2(d_s * exponent)
            gradient = tl.zeros([BLOCK], tl.float32)
            if teacher is not None:
                t = tl.load(teacher + cols, mask=readable, other=-INF).to(tl.float32)
                d_t = t - m_t
                q = e_s * over_s
                if REVERSE:
                    gap = (d_s * inverse - log_s) - (d_t * inverse_teacher - log_t)
                    gradient = kd_scale * tl.where(q > 0, q * (gap - kd), 0.0)
                else:
                    gradient = kd_scale * (q - tl.exp2(d_t * exponent_teacher) * over_t)
                gradient = tl.where(kd_scale == 0.0, 0.0, gradient)
            if labels is not None:
                p_one = at_one(e_s, d_s, ROOT) * over_1
                gradient += ce_scale * tl.where(cols == label, p_one - 1.0, p_one)
            gradient = over_raw(gradient, s, logit_scale, soft_cap, SCALED, CAPPED)
            gradient = tl.where(live, tl.where(good, gradient, NAN), 0.0)
            tl.store(student + cols, rounded(gradient, student), mask=inside)
