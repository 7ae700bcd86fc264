"""From a prepared call to a report for people.

In: a request and a device.
Out: `Explanation`, with its text and its picture.
"""
