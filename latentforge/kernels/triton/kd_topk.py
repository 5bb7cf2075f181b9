"""The KD loss of top-k targets with an exact tail: one program a row, no atomics on the logits, any k.

The tail of the student is summed over the tokens outside the top-k, never taken as a difference, since it may be a
millionth of the whole. So that the sweep over the row does not have to search among k ids, they are taken out of its
way first: where the gradient is to be written, minus infinity is put over their logits (after these have been copied to
``saved``); where nothing may be written, they are marked in a map of one bit a token. Either way a sweep costs the same
for any k. The k entries' own gradient is put in place at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentforge.kernels.triton.logits import INF, NAN, at_one, below, over_raw, raised, rounded, row_of, shaped

# One compiled kernel serves every size and address: what would make it another one is said by a switch.
INTEGERS = ["student_stride", "vocab", "k", "words", "ignore_index"]
POINTERS = ["student", "ids", "logprobs", "tail", "labels", "bias", "saved", "marks", "ce_out", "kd_out"]


@triton.jit
def divergence(log_p, log_q, REVERSE: tl.constexpr):
    """(the term of KL, its derivative but for the term with the whole KL): p log(p/q), q - p or q log(q/p), the same"""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if REVERSE:
        term = tl.where(q > 0, q * (log_q - log_p), 0.0)
        return term, term
    return tl.where(p > 0, p * (log_p - log_q), 0.0), q - p


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def kd_topk(
    student,  # [rows, vocab], overwritten by the gradient where WRITE
    ids,  # [rows, k] int32, no id twice in a row; -1 at its end: absent
    logprobs,  # [rows, k] fp32 at temperature 1
    tail,  # [rows] fp32, log of the teacher's mass outside at its temperature
    labels,  # [rows] int64, or None: no cross-entropy
    bias,  # [vocab], or None
    saved,  # [rows, k] fp32, scratch: the shaped logits of the top-k
    marks,  # [rows, words] int32 zeros, scratch: one bit a token; None where WRITE
    ce_out,  # [rows] fp32
    kd_out,  # [rows] fp32
    student_stride,
    vocab,
    k,
    words,
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
    PIECE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = row_of(student, row, student_stride, ALIGNED)
    ids += row * k
    logprobs += row * k
    saved += row * k
    if not WRITE:
        marks += row * words
    live = row >= 0
    s_label = 0.0
    label = -1
    if labels is not None:
        label = tl.load(labels + row)
        live = label != ignore_index
        label = tl.where(live, label, 0)
        s_label = shaped(tl.load(student + label), bias, label, live, logit_scale, soft_cap, SCALED, CAPPED)
    read = tl.where(live, vocab, 0)  # ignored rows are not even read
    pieces = tl.where(live, k, 0)

    # The label's logit has to be read before minus infinity is put there.
    tl.debug_barrier()
    log_tail = tl.load(tail + row)
    m_t = log_tail
    m_k = -INF
    z_t = tl.zeros([PIECE], tl.float32)
    z_k = tl.zeros([PIECE], tl.float32)
    z_1 = tl.zeros([PIECE], tl.float32)
    present = tl.zeros([PIECE], tl.int32)
    for start in range(0, pieces, PIECE):
        at = start + tl.arange(0, PIECE)
        token = tl.load(ids + at, mask=at < k, other=-1)
        given = token >= 0
        present += given.to(tl.int32)
        t = tl.load(logprobs + at, mask=given, other=-INF) * inverse_teacher
        x = tl.load(student + token, mask=given, other=-INF)
        s = shaped(x, bias, token, given, logit_scale, soft_cap, SCALED, CAPPED)
        tl.store(saved + at, s, mask=given)
        if WRITE:
            tl.store(student + token, rounded(tl.full([PIECE], -INF, tl.float32), student), mask=given)
        else:
            tl.atomic_or(marks + (token >> 5), (1 << (token & 31)).to(tl.int32), mask=given)
        n_t = tl.maximum(m_t, tl.max(t, 0))
        base_t, step_t = raised(m_t, n_t)
        m_t = n_t
        z_t = z_t * tl.exp(step_t) + tl.exp(t - base_t)
        n_k = tl.maximum(m_k, tl.max(s, 0))
        base_k, step_k = raised(m_k, n_k)
        m_k = n_k
        d_k = s - base_k
        e_k = tl.exp2(d_k * exponent)
        shrink = tl.exp2(step_k * exponent)
        if ROOT != 1:
            z_1 = z_1 * at_one(shrink, step_k, ROOT) + at_one(e_k, d_k, ROOT)
        z_k = z_k * shrink + e_k
    # From here on the row's own entries: what is absent stands at the end.
    pieces = tl.sum(present, 0)
    tl.debug_barrier()

    m_o = -INF
    z_o = tl.zeros([BLOCK], tl.float32)
    one_o = tl.zeros([BLOCK], tl.float32)
    for start in range(0, read, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = below(cols, vocab, ALIGNED)
        x = tl.load(student + cols, mask=inside, other=-INF)
        s = shaped(x, bias, cols, inside, logit_scale, soft_cap, SCALED, CAPPED)
        if not WRITE:
            word = tl.load(marks + (cols >> 5), mask=inside, other=0)
            s = tl.where(((word >> (cols & 31)) & 1) != 0, -INF, s)
        n_o = tl.maximum(m_o, tl.max(s, 0))
        base_o, step_o = raised(m_o, n_o)
        m_o = n_o
        d_o = s - base_o
        e_o = tl.exp2(d_o * exponent)
        shrink = tl.exp2(step_o * exponent)
        if ROOT != 1:
            one_o = one_o * at_one(shrink, step_o, ROOT) + at_one(e_o, d_o, ROOT)
        z_o = z_o * shrink + e_o

    # Both parts relative to the larger of their maxima.
    m_s = tl.maximum(m_k, m_o)
    base_k, step_k = raised(m_k, m_s)
    base_o, step_o = raised(m_o, m_s)
    sum_o = tl.sum(z_o, 0)
    sum_s = tl.sum(z_k, 0) * tl.exp2(step_k * exponent) + sum_o * tl.exp2(step_o * exponent)
    sum_1 = sum_s
    if ROOT != 1:
        sum_1 = tl.sum(z_1, 0) * at_one(tl.exp2(step_k * exponent), step_k, ROOT)
        sum_1 += tl.sum(one_o, 0) * at_one(tl.exp2(step_o * exponent), step_o, ROOT)
    log_s = tl.log(sum_s)
    base_t = tl.where(m_t == -INF, 0.0, m_t)
    sum_t = tl.sum(z_t, 0) + tl.exp(log_tail - base_t)
    log_t = tl.log(sum_t)
    good = (sum_s > 0) & (sum_s < INF) & (sum_t > 0) & (sum_t < INF)

    # The tail's entry, and then the others, of the two folded distributions.
    log_q_tail = tl.where(sum_o > 0, (step_o * inverse + tl.log(sum_o)) - log_s, -INF)
    log_p_tail = (log_tail - m_t) - log_t
    kd_tail, d_tail = divergence(log_p_tail, log_q_tail, REVERSE)
    terms = tl.zeros([PIECE], tl.float32)
    for start in range(0, pieces, PIECE):
        at = start + tl.arange(0, PIECE)
        given = at < pieces
        t = tl.load(logprobs + at, mask=given, other=-INF) * inverse_teacher
        s = tl.load(saved + at, mask=given, other=-INF)
        term, slope = divergence((t - m_t) - log_t, (s - m_s) * inverse - log_s, REVERSE)
        terms += tl.where(given, term, 0.0)
    kd = tl.sum(terms, 0) + kd_tail
    good = good & (kd == kd)
    ce = (m_s - s_label) + tl.log(sum_1)
    tl.store(kd_out + row, tl.where(live, tl.where(good, kd, NAN), 0.0))
    if labels is None:
        ce = 0.0
    tl.store(ce_out + row, tl.where(live, tl.where(good, ce, NAN), 0.0))

    if WRITE:
        good = good & ((kd < INF) | (not REVERSE) | (kd_scale == 0.0))
        over_1 = 1.0 / sum_1
        if REVERSE:
            d_tail -= tl.exp(log_q_tail) * kd
        # What falls on the tail's entry is shared among the tokens outside in proportion to the student's own.
        share = tl.where((sum_o > 0) & (kd_scale != 0.0), kd_scale * d_tail / sum_o, 0.0)
        base_s = tl.where(m_s == -INF, 0.0, m_s)
        rest_o = tl.where(m_o == -INF, 0.0, m_o)
        blocks = tl.cdiv(vocab, BLOCK)
        for block in range(blocks):
            cols = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
            inside = below(cols, vocab, ALIGNED)
            readable = below(cols, read, ALIGNED)
            x = tl.load(student + cols, mask=readable, other=-INF)
            s = shaped(x, bias, cols, inside, logit_scale, soft_cap, SCALED, CAPPED)
            gradient = share * tl.exp2((s - rest_o) * exponent)
            if labels is not None:
                d_s = s - base_s
                p_one = at_one(tl.exp2(d_s * exponent), d_s, ROOT) * over_1
                gradient += ce_scale * tl.where(cols == label, p_one - 1.0, p_one)
            gradient = over_raw(gradient, s, logit_scale, soft_cap, SCALED, CAPPED)
            gradient = tl.where(live, tl.where(good, gradient, NAN), 0.0)
            tl.store(student + cols, rounded(gradient, student), mask=inside)
        tl.debug_barrier()
        for start in range(0, pieces, PIECE):
            at = start + tl.arange(0, PIECE)
            given = at < pieces
            token = tl.load(ids + at, mask=given, other=0)
            t = tl.load(logprobs + at, mask=given, other=-INF) * inverse_teacher
            s = tl.load(saved + at, mask=given, other=-INF)
            log_q = (s - base_s) * inverse - log_s
            term, slope = divergence((t - m_t) - log_t, log_q, REVERSE)
            if REVERSE:
                slope -= tl.exp(log_q) * kd
            gradient = tl.where(kd_scale == 0.0, 0.0, kd_scale * slope)
            if labels is not None:
                d_s = s - base_s
                p_one = at_one(tl.exp2(d_s * exponent), d_s, ROOT) * over_1
                gradient += ce_scale * tl.where(token == label, p_one - 1.0, p_one)
            gradient = over_raw(gradient, s, logit_scale, soft_cap, SCALED, CAPPED)
            gradient = tl.where(good, gradient, NAN)
            tl.store(student + token, rounded(gradient, student), mask=given)
