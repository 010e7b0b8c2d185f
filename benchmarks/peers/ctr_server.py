"""The server that the peers without one of their own need: a table and a tower, updated by whoever calls."""

import torch
from ctr_torch import RATE, table, tower


class Server:
    def __init__(self):
        torch.set_num_threads(1)
        self.rows = table()
        self.tower = [parameter.detach() for parameter in tower().parameters()]

    @torch.no_grad()
    def push_pull(self, ids, grads, tower_grads, wanted):
        """Apply the gradients of unique ``ids`` and of the tower; return the rows ``wanted`` and the tower."""
        if len(ids):
            self.rows.index_add_(0, ids, grads, alpha=-RATE)
            for parameter, grad in zip(self.tower, tower_grads, strict=True):
                parameter.add_(grad, alpha=-RATE)
        return self.rows[wanted], self.tower


def work(push_pull, parts, warm, ready, now):
    """A worker's loop: one call for each step pushes its gradients and pulls the rows of the next."""
    from ctr_torch import step

    torch.set_num_threads(1)
    model = tower()
    unique = [torch.unique(part[0], return_inverse=True) for part in parts[:1]]
    rows, weights = push_pull(torch.empty(0, dtype=torch.int64), torch.empty(0), [], unique[0][0])
    (ids, inverse), began = unique[0], 0.0
    for n, (_, numbers, clicks) in enumerate(parts):
        if n == warm:
            ready()
            began = now()
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        rows = rows.clone().requires_grad_()
        step(model, torch.nn.functional.embedding(inverse, rows).flatten(1), numbers, clicks)
        tower_grads = [parameter.grad for parameter in model.parameters()]
        following = parts[n + 1][0] if n + 1 < len(parts) else parts[0][0]
        next_ids, inverse = torch.unique(following, return_inverse=True)
        rows, weights = push_pull(ids, rows.grad, tower_grads, next_ids)
        ids = next_ids
    return began, now()
