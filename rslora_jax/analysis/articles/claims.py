"""Articles: what the popular texts on rank and scale claim, and what is true of it."""

from rslora_jax.tables import Table

__all__ = ["CLAIMS", "claims"]

# (claim, verdict, why), in the order of the walkthrough's tables; numbers as measured there.
CLAIMS = (
    (
        "From rank 1 to 64, alpha/r falls from 16 to 0.25 and alpha/sqrt(r) only to 2.",
        "true",
        "Arithmetic.",
    ),
    (
        "Rank 4 holds over 99 % of a style update.",
        "half",
        "99.15 % of this 64 x 64 matrix. Its noise grows with the width: 87 % at 256.",
    ),
    (
        "Rank 8 misses over 70 % of a facts update.",
        "half",
        "It holds 28.34 %, because the singular values were set so: no evidence on models.",
    ),
    (
        "With small ranks the error of style drops quickly.",
        "false",
        "2.989 at rank 4 and 1.000 at rank 8, which is the error of no update; 0.092 and 0.081 "
        "are possible.",
    ),
    (
        "RS-LoRA's error falls more steadily.",
        "true",
        "It falls at every rank, as its scale does.",
    ),
    (
        "RS-LoRA handles higher ranks better.",
        "false",
        "Here it is worse than alpha/r at every rank, and worse than no update: always above 1.",
    ),
    (
        "At ranks 32 and 48 alpha/r scales too much and turns unstable.",
        "false",
        "The sign is wrong: s = 0.5 and 0.333 scale too little. The dip at 16 is s = 1.",
    ),
    (
        "The table shows what the rank does.",
        "false",
        "It shows |s - 1|. Training adapts b to s, and both rules then reach the best column.",
    ),
    (
        "The table shows the collapse of LoRA's scale.",
        "false",
        "The collapse is one of learning, not of reconstruction: see the first steps.",
    ),
    (
        "Above rank 16 avoid alpha/r: its gradients vanish and it is unstable.",
        "half",
        "Gradients shrink as r^-0.5 and SGD slows down. But at high learning rates alpha/r is the "
        "last to diverge, under Adam its signal does not depend on the rank, and alpha = 2 r is a "
        "constant scale.",
    ),
    (
        "alpha/sqrt(r) keeps activations and gradients at one size for any rank.",
        "half",
        "On average over draws of a, under SGD. The norms of one adapter do so only at ranks far "
        "above the dimension of its inputs.",
    ),
    (
        "W is d x k, A is r x d, B is k x r.",
        "false",
        "B A would be k x d. A is r x k and B is d x r.",
    ),
)


def claims() -> Table:
    """One row a claim: ``claim``, ``verdict`` (true, half or false) and ``why``.

    The claims are paraphrased; "the table" is the one that `style_facts.error_table`
    reproduces.

    Example:
      >>> claims().select(verdict="true").column("why")[0]
      'Arithmetic.'
    """
    return Table(("claim", "verdict", "why"), CLAIMS)
