"""TensorFlow's ParameterServerStrategy: a server, two workers, and the coordinator that schedules their steps.

Each scheduled call makes ten steps, so that the dispatch does not count; the ids of a batch are made unique.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

from ctr_data import BATCH, DIM, FIELDS, HIDDEN, NUMBERS, RATE, ROWS, samples

WORKERS, WARM, AT_ONCE = 2, 4, 10


def one_thread():
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)  # with one, a step that waits for the server blocks it
    return tf


def serve(cluster, job, index):
    tf = one_thread()
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=2)
    tf.distribute.Server(cluster, job_name=job, task_index=index, protocol="grpc", config=config).join()


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def coordinate(cluster, calls):
    tf = one_thread()
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(cluster), rpc_layer="grpc", task_type="chief", task_id=0
    )
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    sizes = (FIELDS * DIM + NUMBERS, *HIDDEN, 1)
    with strategy.scope():
        rows = tf.Variable(tf.random.normal((ROWS, DIM), stddev=0.01))
        tower = [
            (tf.Variable(tf.random.normal((i, o), stddev=i**-0.5)), tf.Variable(tf.zeros(o)))
            for i, o in pairwise(sizes)
        ]

    @tf.function
    def calls_of_a_worker(iterator):
        for _ in tf.range(AT_ONCE):
            ids, numbers, clicks = next(iterator)
            unique, inverse = tf.unique(tf.reshape(ids, [-1]))
            with tf.GradientTape() as tape:
                found = tf.gather(rows, unique)
                tape.watch(found)
                x = tf.concat([tf.reshape(tf.gather(found, inverse), [BATCH, -1]), numbers], 1)
                for layer, (weight, bias) in enumerate(tower):
                    x = x @ weight + bias
                    x = tf.nn.relu(x) if layer + 1 < len(tower) else x
                loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(clicks, tf.squeeze(x, 1)))
            variables = [v for layer in tower for v in layer]
            grads = tape.gradient(loss, [found, *variables])
            rows.scatter_sub(tf.IndexedSlices(RATE * tf.convert_to_tensor(grads[0]), unique))
            for variable, grad in zip(variables, grads[1:], strict=True):
                variable.assign_sub(RATE * grad)

    def dataset():
        return tf.data.Dataset.from_tensor_slices(samples(BATCH * 100)).batch(BATCH, drop_remainder=True).repeat()

    iterator = iter(coordinator.create_per_worker_dataset(dataset))
    for _ in range(WARM * WORKERS):
        coordinator.schedule(calls_of_a_worker, args=(iterator,))
    coordinator.join()
    began = time.time()
    for _ in range(calls * WORKERS):
        coordinator.schedule(calls_of_a_worker, args=(iterator,))
    coordinator.join()
    seconds = time.time() - began
    print(json.dumps({"samples_per_second": calls * WORKERS * AT_ONCE * BATCH / seconds}), flush=True)


if __name__ == "__main__":
    calls = max(1, int(sys.argv[1]) // AT_ONCE)
    chief, server, *others = (f"127.0.0.1:{port}" for port in free_ports(WORKERS + 2))
    cluster = {"chief": [chief], "ps": [server], "worker": others}
    context = multiprocessing.get_context("spawn")
    roles = [context.Process(target=serve, args=(cluster, "ps", 0))]
    roles += [context.Process(target=serve, args=(cluster, "worker", i)) for i in range(WORKERS)]
    for role in roles:
        role.start()
    try:
        coordinate(cluster, calls)
    finally:
        for role in roles:
            role.kill()
            role.join()
    os._exit(0)  # its coordinator threads do not end by themselves once the servers are gone
