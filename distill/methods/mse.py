"""The plain baseline in distances: a head on the student's side, and the squared error to the raw teacher."""

from distill.methods._heads import StudentHead


class MSE(StudentHead):
    """Mean squared error to the teacher through a student-side head, a plain baseline (no paper of its own).

    Head: student side, fed by match(mse), trained with the student and left behind after training.

    Options:
        head: "linear", "layernorm_linear" or "mlp".
    """

    kind = "mse"
