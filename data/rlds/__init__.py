"""Open-X data sets in RLDS form (TFDS folders of TFRecord shards), read without TensorFlow.

``tensorflow_datasets`` says which features there are and brings the record's message type (``tf.train.Example``) and the
decoders of unusual features; the framing of TFRecord files, with its check sums, is read here. Only the features asked for
are taken out of a record, each as one array, and images stay encoded: that is what makes it fast. Episodes are streamed; no
more than one record is in memory.
"""
