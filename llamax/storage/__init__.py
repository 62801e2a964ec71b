"""Buckets: `gs://` and `s3://` addresses worked on through copies in the cache folder, so that all else sees files.

    files.py    a file on a disk that is whole or absent, whoever else writes it; a lock
    places.py   which folder of the cache stands for which address, and back
    bucket.py   the seven operations there are, tried again while a bucket does not answer; s3.py and gcs.py do them
    copies.py   a folder that follows a prefix of a bucket, and sends back what changed, if nobody else changed it
    leases.py   at most one live holder of a name, in a folder or in a bucket

Nothing here imports a client before an address asks for it.
"""
