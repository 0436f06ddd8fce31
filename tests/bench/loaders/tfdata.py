"""tf.data: TFRecords, `decode_and_crop_jpeg` and the resize of TensorFlow's own ImageNet pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, SIDE, photos

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
PER_FILE = 256


def convert(data: Path, out: Path) -> None:
    import tensorflow as tf

    out.mkdir(parents=True, exist_ok=True)
    records = enumerate(photos.samples(data))
    for number, group in groupby(records, key=lambda record: record[0] // PER_FILE):
        with tf.io.TFRecordWriter(str(out / f"train-{number:05d}.tfrecord")) as writer:
            for _, (_, image, label) in group:
                features = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def batches(data: Path, workers: int) -> Iterator[Any]:
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(workers)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    files = tf.data.Dataset.from_tensor_slices(sorted(str(path) for path in data.glob("*.tfrecord"))).shuffle(1000)
    records = files.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=1, deterministic=False)
    options = tf.data.Options()
    options.deterministic = False
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1
    dataset = records.shuffle(1000).map(_work, num_parallel_calls=workers, deterministic=False)
    for images, _ in dataset.batch(BATCH, drop_remainder=True).prefetch(2).with_options(options):
        yield images.numpy()


def _work(record: Any) -> Any:
    import tensorflow as tf

    fields = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    sample = tf.io.parse_single_example(record, fields)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(sample["image"]),
        bounding_boxes=tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
        min_object_covered=0.0,
        aspect_ratio_range=[3 / 4, 4 / 3],
        area_range=[0.08, 1.0],
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.stack([begin[0], begin[1], size[0], size[1]])
    image = tf.image.decode_and_crop_jpeg(sample["image"], window, channels=3)
    image = tf.image.random_flip_left_right(tf.image.resize(image, [SIDE, SIDE], method="bilinear"))
    return tf.cast(image, tf.uint8), sample["label"]
