"""The plain baseline in angles: a head on the student's side, and the cosine to the raw teacher."""

from distill.methods._heads import StudentHead


class Cosine(StudentHead):
    """1 − cosine to the teacher through a student-side head, a plain baseline (no paper of its own).

    Head: student side, fed by match(cosine), trained with the student and left behind after training.

    Options:
        head: "linear", "layernorm_linear" or "mlp".
    """

    kind = "cosine"
